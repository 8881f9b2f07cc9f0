"""The programs that Twinview is measured against."""

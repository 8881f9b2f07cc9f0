"""What is measured while an encoder is being pretrained, without touching how it is trained."""

#!/usr/bin/env bash
# Set up the virtual environment: `tools/setup.sh user` (what a user needs) or `tools/setup.sh dev` (and the rest).
# Does nothing when requirements and constraints are those that it last installed.
set -euo pipefail
cd "$(dirname "$0")/.."

kind=${1:-user}
case $kind in
  user) requirements=requirements.txt ;;
  dev) requirements=requirements-dev.txt ;;
  *) echo "setup: expected user or dev, got $kind" >&2; exit 2 ;;
esac

venv=.venv
wanted=$(cat requirements*.txt constraints.txt tools/setup.sh | sha256sum | cut -d' ' -f1)
done_file=$venv/.installed-$kind
[ "$(cat "$done_file" 2>/dev/null)" = "$wanted" ] && exit 0

python=${PYTHON:-}
for candidate in ${python:-python3.12 python3.11 python3.10 python3}; do
  # Asked to run, since a version manager's stand-in may exist without the Python behind it.
  if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
    python=$candidate
    break
  fi
  python=
done
[ -n "$python" ] || { echo "setup: Python 3.10, 3.11 or 3.12 is needed and none was found; install one, or set PYTHON" >&2; exit 2; }

# FFCV is compiled against OpenCV and libjpeg-turbo.
packages=()
command -v g++ >/dev/null || packages+=(g++)
command -v pkg-config >/dev/null || packages+=(pkg-config)
pkg-config --exists opencv4 2>/dev/null || packages+=(libopencv-dev)
pkg-config --exists libturbojpeg 2>/dev/null || packages+=(libturbojpeg0-dev)
"$python" -c 'import ensurepip, venv' 2>/dev/null || packages+=(python3-venv)
"$python" -c 'import pathlib, sys, sysconfig; sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())' || packages+=(python3-dev)
if [ $kind = dev ] && [ "$(id -u)" = 0 ]; then  # for tests that make hosts and disks of their own, as root alone may
  command -v ip >/dev/null || packages+=(iproute2)
  command -v mkfs.ext4 >/dev/null || packages+=(e2fsprogs)
fi
if [ ${#packages[@]} -gt 0 ]; then
  as_root=()
  [ "$(id -u)" = 0 ] || as_root=(sudo -n)
  if ! command -v apt-get >/dev/null || { [ ${#as_root[@]} -gt 0 ] && ! sudo -n true 2>/dev/null; }; then
    echo "setup: these Debian packages are missing and may not be installed from here: ${packages[*]}; run: sudo apt-get install ${packages[*]}" >&2
    exit 2
  fi
  echo "setup: installing Debian packages: ${packages[*]}"
  "${as_root[@]}" apt-get update -qq
  DEBIAN_FRONTEND=noninteractive "${as_root[@]}" apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
fi

[ -x $venv/bin/python ] || "$python" -m venv $venv
echo "setup: installing $requirements into $venv (several GB the first time)"
$venv/bin/python -m pip install --quiet --disable-pip-version-check "$(grep -o '^uv==[^ ]*' constraints.txt)"
$venv/bin/uv pip install --quiet --python $venv/bin/python -r "$requirements" -c constraints.txt
echo "$wanted" >"$done_file"

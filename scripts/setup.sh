#!/bin/bash
# Make this checkout ready to run: what the distribution provides, then .venv.
# As root on a machine with apt, what is missing is installed. Otherwise each missing thing is
# named, with what to install, and nothing is changed.
#
# PYTHON=/path/to/python3 chooses another interpreter than the distribution's.
set -euo pipefail
cd "$(dirname "$0")/.."

[ -w . ] || { echo "setup: $PWD cannot be written: clone the project to a folder that can." >&2; exit 1; }

# dbus-python and PyGObject come as packages of the distribution, for its own python3 alone.
PYTHON=${PYTHON:-/usr/bin/python3}

py() { "$PYTHON" -c "$1" >/dev/null 2>&1; }
has() { command -v "$1" >/dev/null 2>&1; }
systemd_is_there() { [ -x /lib/systemd/systemd ] || [ -x /usr/lib/systemd/systemd ]; }
bus_is_there() {
  has dbus-daemon && { [ -e /lib/systemd/system/dbus.socket ] || [ -e /usr/lib/systemd/system/dbus.socket ]; }
}

# One line for each need: the check | apt's package | dnf's package | what it is for
NEEDS='
has make                              |make          |make             |make, which runs everything here
py "import sys"                       |python3       |python3          |Python (looked for as '"$PYTHON"')
py "import venv, ensurepip"           |python3-venv  |python3          |the venv module of Python
py "import dbus"                      |python3-dbus  |python3-dbus     |dbus-python, for the tests that mock the bus
py "from gi.repository import GLib"   |python3-gi    |python3-gobject  |PyGObject, for the tests that mock the bus
py "import ctypes; ctypes.CDLL(\"libudev.so.1\")"|libudev1|systemd-libs|libudev, to find the GPUs
systemd_is_there                      |systemd       |systemd          |systemd, which runs the jobs
bus_is_there                          |dbus          |dbus-daemon      |the D-Bus daemon, to talk to systemd
[ -n "$(ls /lib/*/security/pam_systemd.so /lib64/security/pam_systemd.so 2>/dev/null)" ] |libpam-systemd|systemd-pam|PAM for user managers, for the tests
[ -e /usr/lib/systemd/user/dbus.socket ] |dbus-user-session|dbus-daemon|a bus for each user, for the tests
has useradd |passwd|shadow-utils|useradd, for the tests
has ffmpeg && has ffprobe             |ffmpeg        |ffmpeg           |ffmpeg and ffprobe (for dnf, from RPM Fusion)
has unshare && has setpriv             |util-linux    |util-linux       |unshare and setpriv, for the tests
has mount                             |mount         |util-linux       |mount, for the tests
has ps                                |procps        |procps-ng        |ps, to look at processes
[ -x /usr/bin/time ]                   |time          |time             |GNU time, to compare figures with, for the tests
'

# Runs "$1" (a function) with the fields of each need that is not met.
for_each_missing() {
  local check apt dnf what
  while IFS='|' read -r check apt dnf what; do
    [ -z "$check" ] || eval "$check" || "$1" "${apt// /}" "${dnf// /}" "$what"
  done <<<"$NEEDS"
}

missing=()
collect() { missing+=("$1"); }
explain() {
  if has apt-get; then
    echo "setup: missing: $3. Install it as root: apt-get install $1" >&2
  elif has dnf; then
    echo "setup: missing: $3. Install it as root: dnf install $2" >&2
  else
    echo "setup: missing: $3. Install it; Debian's package is called $1, Fedora's $2." >&2
  fi
}

for_each_missing collect
if [ ${#missing[@]} -gt 0 ] && [ "$(id -u)" = 0 ] && has apt-get; then
  echo "setup: installing with apt: ${missing[*]}"
  log=$(mktemp)
  export DEBIAN_FRONTEND=noninteractive
  if ! { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >"$log" 2>&1 </dev/null; then
    tail -n 20 "$log" >&2
    echo "setup: apt could not install: ${missing[*]}. Its last lines are above; the whole log is $log." >&2
    exit 1
  fi
  rm -f "$log"
  missing=()
  for_each_missing collect
fi
if [ ${#missing[@]} -gt 0 ]; then
  for_each_missing explain
  exit 1
fi

# nginx with its RTMP module, for the tests of streams. Unpacked rather than installed, where that
# is possible: installing the package would start a web server on this machine.
nginx_is_there() { [ -x "$1/usr/sbin/nginx" ] && [ -e "$1/usr/lib/nginx/modules/ngx_rtmp_module.so" ]; }
if ! nginx_is_there build/nginx && ! nginx_is_there ''; then
  if ! has apt-get || ! has dpkg-deb; then
    echo "setup: missing: nginx and its RTMP module, for the tests of streams. Install them; Debian's packages are called nginx and libnginx-mod-rtmp." >&2
    exit 1
  fi
  echo "setup: unpacking nginx for the tests of streams"
  rm -rf build/nginx.new && mkdir -p build/nginx.new
  if ! (cd build/nginx.new && apt-get download -qq nginx libnginx-mod-rtmp >/dev/null 2>apt.log); then
    echo "setup: apt could not download nginx and libnginx-mod-rtmp (run apt-get update as root first?): $(tail -n 1 build/nginx.new/apt.log)" >&2
    exit 1
  fi
  for package in build/nginx.new/*.deb; do dpkg-deb -x "$package" build/nginx.new; done
  rm -f build/nginx.new/*.deb build/nginx.new/apt.log
  rm -rf build/nginx && mv build/nginx.new build/nginx
fi
if ! py 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "setup: $PYTHON is $("$PYTHON" --version), but 3.11 or newer is needed (Debian 12, Ubuntu 24.04, Fedora 37 or newer have it; PYTHON=... names another one)." >&2
  exit 1
fi

# A .venv of another interpreter, or without the distribution's packages, cannot be repaired.
if ! .venv/bin/python -c 'import dbus, gi' >/dev/null 2>&1 || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  echo "setup: making .venv with $("$PYTHON" --version)"
  "$PYTHON" -m venv --clear --system-site-packages .venv
fi
echo "setup: installing the project into .venv"
if ! .venv/bin/python -m pip install --quiet --quiet --disable-pip-version-check --no-input -c constraints.txt -e '.[test]'; then
  echo "setup: pip failed, see above. It needs a package index it can reach (PIP_INDEX_URL, PIP_FIND_LINKS)." >&2
  exit 1
fi
touch .venv/.ready

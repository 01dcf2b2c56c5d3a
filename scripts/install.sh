#!/bin/bash
# Install ffmpeg-worker as a system service from this checkout, or upgrade it.
#
#   install.sh [--wheels DIR]       install or upgrade (the same command)
#   install.sh --uninstall          end its jobs and remove it; configuration, ledger, logs stay
#   install.sh --uninstall --purge  remove these too, with the media below the work directory
#
# --wheels DIR takes every Python package from DIR (see `make wheels`) and needs no network.
# PYTHON=/path/to/python3 chooses the interpreter.
#
# The program is a venv of its own below /opt/ffmpeg-worker/releases. `current` points at the one
# in use and is switched only when the new one is complete and runs: an upgrade that fails leaves
# everything as it was. The release before is kept. Jobs run on during an upgrade: they are units of
# their own, and the new worker follows them.
set -euo pipefail
umask 022

SRC=$(cd "$(dirname "$0")/.." && pwd)
PREFIX=/opt/ffmpeg-worker
ETC=/etc/ffmpeg-worker
DATA=/var/lib/ffmpeg-worker
LOGS=/var/log/ffmpeg-worker
PROGRAM=/usr/local/bin/ffmpeg-worker
UNIT_DIR=/etc/systemd/system
LOGROTATE=/etc/logrotate.d/ffmpeg-worker
USER_NAME=ffmpeg-worker
SYSUSERS=/etc/sysusers.d/ffmpeg-worker.conf
TMPFILES=/etc/tmpfiles.d/ffmpeg-worker.conf
SERVICE=ffmpeg-worker.service
UNITS=("$SERVICE" ffmpeg.slice ffmpeg-live.slice ffmpeg-default.slice ffmpeg-batch.slice)

say() { echo "install: $*"; }
warn() { echo "install: warning: $*" >&2; }
die() { echo "install: $*" >&2; exit 1; }
has() { command -v "$1" >/dev/null 2>&1; }
systemd_runs() { [ -d /run/systemd/system ]; }

count_jobs() { # how many units of jobs run
  systemctl list-units --plain --no-legend --state=running 'ffmpeg-job-*.service' | wc -l
}

package_hint() { # what to type for a package: Debian's name, RHEL's name
  if has apt-get; then echo "apt-get install $1"
  elif has dnf; then echo "dnf install $2"
  else echo "install the package $1 (Debian) or $2 (RHEL, Fedora)"; fi
}

find_python() {
  local candidates=(/usr/bin/python3 /usr/bin/python3.1{4,3,2,1} python3) candidate
  [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      python=$candidate
      "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        die "$python lacks the venv module: $(package_hint python3-venv python3.11)"
      case $("$python" -c 'import os, sys; print(os.path.realpath(sys.executable))') in
        /home/* | /root/* | /run/user/*)
          die "$python lies in a home, which the service does not see (ProtectHome=): choose another with PYTHON=." ;;
      esac
      return
    fi
  done
  die "Python 3.11 or newer is needed (looked for: ${candidates[*]}): $(package_hint 'python3 python3-venv' python3.11)"
}

check_machine() {
  [ "$(uname -s)" = Linux ] || die "this is $(uname -s), but the worker needs Linux with systemd."
  [ "$(id -u)" = 0 ] || die "run this as root: it writes to /opt, /etc and /var."
  has systemctl || die "there is no systemctl: the worker needs systemd 240 or newer to run its jobs."
  local version
  version=$(systemctl --version | awk 'NR == 1 {print int($2)}')
  [ "${version:-0}" -ge 240 ] || die "systemd is version ${version:-unknown}, but 240 or newer is needed (Type=exec)."
}

# put MODE SOURCE TARGET. On a first install a different file at TARGET is not ours, but that of a
# worker set up by hand: it is kept, under a name that systemd and logrotate ignore.
put() {
  if [ "$first" = yes ] && [ -e "$3" ] && ! cmp -s "$2" "$3"; then
    mv -f "$3" "$3.disabled"
    say "kept the $3 that was there as $3.disabled"
  fi
  install -m "$1" -o root -g root -T "$2" "$3"
}

build_release() {
  release=$(mktemp -d "$PREFIX/releases/$(date +%Y%m%dT%H%M%S).XXXXXX")
  trap 'rm -rf "$release"' EXIT
  chmod 0755 "$release"
  say "building $release with $("$python" --version)"
  "$python" -m venv "$release"
  local version what=("$SRC" -c "$SRC/constraints.txt")
  if [ -n "$wheels" ]; then
    # The exact version, so that wheels of another checkout are refused.
    version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' "$SRC/worker/__init__.py")
    what=(--no-index --find-links "$wheels" "ffmpeg-worker==$version")
  fi
  PIP_ROOT_USER_ACTION=ignore "$release/bin/python" -m pip install --quiet --quiet --no-input \
    --disable-pip-version-check "${what[@]}" ||
    die "pip failed, see above; nothing was changed. Without network use --wheels DIR (make wheels)."
  "$release/bin/ffmpeg-worker" --version >/dev/null ||
    die "the new release does not run, see above; nothing was changed."
}

activate_release() {
  ln -sfn "$release" "$PREFIX/current.new"
  mv -fT "$PREFIX/current.new" "$PREFIX/current" # rename(2): there is no moment without a program
  trap - EXIT
  if [ -e "$PROGRAM" ] && [ ! -L "$PROGRAM" ]; then
    mv -f "$PROGRAM" "$PROGRAM.disabled"
    say "kept the $PROGRAM that was there as $PROGRAM.disabled"
  fi
  ln -sfn "$PREFIX/current/bin/ffmpeg-worker" "$PROGRAM"
}

# One that is there already is kept as it is. Without systemd-sysusers (a container image, say) the
# tools that every distribution has do the same.
make_user() {
  if has systemd-sysusers; then
    systemd-sysusers "$SYSUSERS" || die "the user $USER_NAME cannot be made, see above."
    return
  fi
  getent group "$USER_NAME" >/dev/null || groupadd --system "$USER_NAME" ||
    die "the group $USER_NAME cannot be made, see above."
  getent passwd "$USER_NAME" >/dev/null ||
    useradd --system --gid "$USER_NAME" --no-create-home --home-dir /nonexistent \
      --shell "$(command -v nologin || echo /bin/false)" \
      --comment 'FFmpeg jobs and their outputs' "$USER_NAME" ||
    die "the user $USER_NAME cannot be made, see above."
}

install_files() {
  install -d -m 0755 "$UNIT_DIR" "$(dirname "$LOGROTATE")" "$(dirname "$SYSUSERS")" "$(dirname "$TMPFILES")"
  put 0644 "$SRC/units/sysusers.d/ffmpeg-worker.conf" "$SYSUSERS"
  put 0644 "$SRC/units/tmpfiles.d/ffmpeg-worker.conf" "$TMPFILES"
  make_user

  install -d -m 0700 -o root -g root "$ETC"
  install -d -m 0711 -o root -g root "$DATA"
  install -d -m 0755 -o root -g root "$LOGS"
  # As $TMPFILES has it: where the folder is there, it may be somebody's, or on another machine.
  [ -d "$DATA/media" ] || install -d -m 0755 -o root -g root "$DATA/media"
  # Made here, for otherwise the agent's umask would make it unreadable until the first rotation.
  [ -e "$LOGS/worker.log" ] || install -m 0644 -o root -g root /dev/null "$LOGS/worker.log"

  local config=$SRC/etc/ffmpeg-worker/config.env
  if [ ! -e "$ETC/config.env" ]; then
    install -m 0600 -o root -g root -T "$config" "$ETC/config.env"
  else
    chown root:root "$ETC/config.env"
    chmod 0600 "$ETC/config.env"
    # The operator's file always differs. What matters is whether ours has changed since it was made.
    if ! cmp -s "$config" "$ETC/config.env" && ! cmp -s "$config" "$PREFIX/config.env.shipped"; then
      install -m 0600 -o root -g root -T "$config" "$ETC/config.env.new"
      say "$ETC/config.env is kept; the new version is $ETC/config.env.new, compare the two."
    fi
  fi
  install -m 0600 -o root -g root -T "$config" "$PREFIX/config.env.shipped"
  if [ -e "$ETC/master-api-key" ]; then
    chown root:root "$ETC/master-api-key"
    chmod 0600 "$ETC/master-api-key"
  fi

  local unit
  for unit in "${UNITS[@]}"; do put 0644 "$SRC/units/$unit" "$UNIT_DIR/$unit"; done
  put 0644 "$SRC/etc/ffmpeg-worker/logrotate" "$LOGROTATE"
}

start_service() {
  systemctl --quiet enable "$SERVICE"
  if grep -q '^MASTER_URL=.*MASTER_IP' "$ETC/config.env"; then
    say "installed and enabled, but not started: MASTER_URL is still the placeholder."
    say "next: set MASTER_URL and MASTER_API_KEY in $ETC/config.env, then: systemctl start $SERVICE"
    say "the key is kept better in $ETC/master-api-key (mode 0600); take MASTER_API_KEY out of config.env then."
    return
  fi
  ! grep -q '^MASTER_API_KEY=your-api-key-here' "$ETC/config.env" ||
    warn "MASTER_API_KEY in $ETC/config.env is still the placeholder: put the key there," \
      "or take the line out and put the key into $ETC/master-api-key."
  if ! systemd_runs; then
    say "installed and enabled. systemd does not run here, so the service starts with the next boot."
    return
  fi
  local running
  running=$(count_jobs)
  # On a restart, unlike on a stop, the worker leaves its jobs running.
  systemctl restart "$SERVICE" || die "installed, but the service does not start: journalctl -u $SERVICE"
  say "installed and running: systemctl status $SERVICE"
  [ "$running" = 0 ] || say "jobs that ran meanwhile and run on: $running; systemctl status 'ffmpeg-job-*' shows them."
}

install_all() {
  find_python
  local program old
  for program in ffmpeg ffprobe; do
    has $program || warn "$program is missing, and without it every job fails: $(package_hint ffmpeg 'ffmpeg (from RPM Fusion)')"
  done
  [ -z "$wheels" ] || [ -d "$wheels" ] || die "--wheels $wheels: there is no such folder."
  first=yes
  [ ! -e "$PREFIX/current" ] || first=no
  previous=$(readlink -f "$PREFIX/current" || true)
  mkdir -p "$PREFIX/releases"
  exec 9>"$PREFIX/.lock"
  flock -n 9 || die "another install is running (it holds $PREFIX/.lock)."
  build_release
  install_files
  activate_release
  ! systemd_runs || systemctl daemon-reload
  for old in "$PREFIX"/releases/*; do # all but this one and the one before
    [ "$old" = "$release" ] || [ "$old" = "$previous" ] || rm -rf "$old"
  done
  start_service
}

uninstall_all() {
  if systemd_runs; then
    local running
    running=$(count_jobs)
    [ "$running" = 0 ] || say "stopping the worker; it sees its jobs off as STOP_MODE says (running: $running)."
    # The worker first: it is to hand its jobs back, which it could not if they were ended for it.
    # Both fail where there is nothing (left) to stop, which is as good.
    systemctl stop "$SERVICE" 2>/dev/null || true
    systemctl stop 'ffmpeg-job-*.service' ffmpeg.slice 2>/dev/null || true
  fi
  systemctl --quiet disable "$SERVICE" 2>/dev/null || true
  rm -f "${UNITS[@]/#/$UNIT_DIR/}" "$LOGROTATE" "$SYSUSERS" "$TMPFILES"
  case $(readlink "$PROGRAM" || true) in "$PREFIX"/*) rm -f "$PROGRAM" ;; esac
  rm -rf "$PREFIX"
  local drop_ins=("${UNITS[@]/%/.d}")
  [ "$purge" = no ] || rm -rf "${drop_ins[@]/#/$UNIT_DIR/}" "$ETC" "$DATA" "$LOGS"
  ! systemd_runs || systemctl daemon-reload
  local kept
  for kept in "$UNIT_DIR/$SERVICE" "$LOGROTATE" "$SYSUSERS" "$TMPFILES" "$PROGRAM"; do
    [ ! -e "$kept.disabled" ] || say "from before the first install: $kept.disabled; to go back to it: mv $kept.disabled $kept"
  done
  if [ "$purge" = yes ]; then
    say "removed, with its configuration, data and logs."
  else
    say "removed. These stay (--purge removes them): $ETC $DATA $LOGS, drop-ins in $UNIT_DIR."
    [ ! -e "$DATA/ledger.db" ] ||
      say "$DATA/ledger.db knows every job, and the results that the master does not have yet: a worker installed later sends them."
  fi
  # Outputs elsewhere may be its own. Its number would go to the next user that is made, and they with it.
  ! getent passwd "$USER_NAME" >/dev/null ||
    say "the user $USER_NAME stays, outputs may be its own; to remove it: userdel $USER_NAME"
}

wheels='' purge=no action=install_all
while [ $# -gt 0 ]; do
  case $1 in
    --wheels) [ $# -ge 2 ] || die "--wheels needs a folder."; wheels=$2; shift ;;
    --wheels=*) wheels=${1#*=} ;;
    --uninstall) action=uninstall_all ;;
    --purge) purge=yes ;;
    -h | --help) sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p;}' "$0"; exit ;;
    *) die "unknown option $1 (see --help)." ;;
  esac
  shift
done
[ $purge = no ] || [ $action = uninstall_all ] || die "--purge goes with --uninstall."
check_machine
$action

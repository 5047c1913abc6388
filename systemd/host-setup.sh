#!/usr/bin/env bash
# Prepares a Debian 12 or 13 host for checkpointing: podman with runc (or crun), and CRIU 4.2 or later.
#
#   systemd/host-setup.sh [--dry-run]
#
# Needs root. Says what it does before doing it, does only what is missing, and can be run again at any time.
# Debian's own CRIU is too old for current kernels (12: 3.17, 13: 4.1), so CRIU is taken from Debian sid, unpacked into a
# folder of its own with its own C library; nothing else of the host changes release.
set -euo pipefail

readonly MIN_CRIU=4.2 ROOT=/opt/warmpool-criu WRAPPER=/usr/local/sbin/criu
readonly RUNTIME_CONF=/etc/containers/containers.conf.d/50-warmpool.conf
dry_run=false
case "${1:-}" in
  "") ;;
  --dry-run) dry_run=true ;;
  *) echo "usage: $0 [--dry-run]" >&2; exit 2 ;;
esac

say() { printf 'host-setup: %s\n' "$*"; }
die() { printf 'host-setup: error: %s\n' "$*" >&2; exit 1; }
step() { # step "what" command... : announce, then do unless --dry-run
  say "$1"; shift
  $dry_run || "$@"
}
at_least() { [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]; }

[ "$(id -u)" = 0 ] || die "run as root: installing packages and checkpointing need it"
# shellcheck disable=SC1091
. /etc/os-release
case "${ID:-}-${VERSION_ID:-}" in
  debian-12|debian-13) ;;
  *) die "this is ${PRETTY_NAME:-an unknown system}; the script knows Debian 12 and 13. Elsewhere install podman 4.3+ and CRIU $MIN_CRIU+ by hand" ;;
esac
arch=$(dpkg --print-architecture)
case $arch in
  amd64) triplet=x86_64-linux-gnu loader=ld-linux-x86-64.so.2 ;;
  arm64) triplet=aarch64-linux-gnu loader=ld-linux-aarch64.so.1 ;;
  *) die "no recipe for the architecture $arch" ;;
esac
work=$(mktemp -d)
chmod 755 "$work"
trap 'rm -rf "$work"' EXIT
export DEBIAN_FRONTEND=noninteractive

# --- podman and what it needs -------------------------------------------------------------------------------------
unified=false
[ "$(stat -fc %T /sys/fs/cgroup)" = cgroup2fs ] && unified=true
packages=(podman runc conmon netavark aardvark-dns iptables nftables zstd libnuma1)
$unified && packages+=(crun)
missing=()
for p in "${packages[@]}"; do
  dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q 'ok installed' || missing+=("$p")
done
if [ ${#missing[@]} -gt 0 ]; then
  refresh_and_install() {
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends "${missing[@]}" >"$work/apt.log" 2>&1 ||
      { tail -n 20 "$work/apt.log" >&2; die "installing ${missing[*]} failed"; }
  }
  step "installing ${missing[*]}" refresh_and_install
else
  say "podman and its parts are installed"
fi

# --- CRIU ---------------------------------------------------------------------------------------------------------
criu_version() { criu --version 2>/dev/null | sed -n 's/^Version: //p'; }
install_criu() {
  # The machine's own mirror and key, with sid instead of its release; apt's own state is not touched.
  local uri key=/usr/share/keyrings/debian-archive-keyring.gpg
  uri=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' 'Origin: Debian' 'Label: Debian' | head -n 1)
  [ -n "$uri" ] || die "no Debian mirror in apt's sources; add one and run again"
  mkdir -p "$work/lists/partial" "$work/archives/partial"
  chown -R _apt "$work/lists" "$work/archives" 2>/dev/null || true
  echo "deb [check-valid-until=no signed-by=$key] $uri sid main" >"$work/sid.list"
  : >"$work/status" # as if nothing were installed, so that every library CRIU needs comes along
  local options=(
    -o Dir::Etc::SourceList="$work/sid.list" -o Dir::Etc::SourceParts=/dev/null
    -o Dir::Etc::Preferences=/dev/null -o Dir::Etc::PreferencesParts=/dev/null -o Dir::State::status="$work/status"
    -o Dir::State::Lists="$work/lists" -o Dir::Cache::archives="$work/archives" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache=
    -o Acquire::Languages=none -o APT::Install-Recommends=false -o APT::Default-Release=
  )
  apt-get "${options[@]}" update -qq
  apt-get "${options[@]}" install -y -qq --download-only criu >"$work/criu.log" 2>&1 ||
    { tail -n 20 "$work/criu.log" >&2; die "downloading CRIU failed"; }
  rm -rf "$ROOT.new"
  mkdir -p "$ROOT.new"
  local deb name
  for deb in "$work"/archives/*.deb; do
    name=$(basename "$deb")
    case $name in
      criu_*|lib*) case $name in libc-bin_*|libc-gconv*|libc-l10n*) ;; *) dpkg-deb -x "$deb" "$ROOT.new" ;; esac ;;
    esac
  done
  rm -rf "$ROOT.new/usr/share/doc" "$ROOT.new/usr/share/man"
  rm -rf "$ROOT" && mv "$ROOT.new" "$ROOT"
  local libraries=$ROOT/usr/lib/$triplet
  mkdir -p "$(dirname "$WRAPPER")"
  cat >"$WRAPPER.new" <<WRAP
#!/bin/sh
exec $libraries/$loader --library-path $libraries:/usr/lib/$triplet:/lib/$triplet $ROOT/usr/sbin/criu "\$@"
WRAP
  chmod 755 "$WRAPPER.new" && mv "$WRAPPER.new" "$WRAPPER"
  hash -r
}
have=$(criu_version || true)
if [ -n "$have" ] && at_least "$have" "$MIN_CRIU" && criu check >/dev/null 2>&1; then
  say "CRIU $have is installed and criu check passes"
else
  if [ -e "$WRAPPER" ] && ! grep -q "$ROOT" "$WRAPPER"; then
    die "$WRAPPER exists and is not ours (version '${have:-unknown}'); remove it or bring it to CRIU $MIN_CRIU+"
  fi
  step "installing CRIU from Debian sid into $ROOT, started by $WRAPPER (now: ${have:-none})" install_criu
fi

# --- podman's OCI runtime -----------------------------------------------------------------------------------------
write_runtime_conf() {
  mkdir -p "$(dirname "$RUNTIME_CONF")"
  printf '# Written by warmpool: crun refuses hybrid cgroups, runc works on both.\n[engine]\nruntime = "runc"\n' >"$RUNTIME_CONF"
}
if ! $unified && [ ! -e "$RUNTIME_CONF" ]; then
  step "telling podman to use runc (cgroup v1 or hybrid here), in $RUNTIME_CONF" write_runtime_conf
fi

# --- the seccomp profile for privileged containers ----------------------------------------------------------------
readonly PROFILE=/etc/warmpool/no-io-uring.json
install_profile() { install -D -m 644 "$(dirname "$0")/../config/no-io-uring.json" "$PROFILE"; }
if [ -e "$PROFILE" ]; then
  say "$PROFILE is there"
else
  step "installing the seccomp profile $PROFILE" install_profile
fi

# --- does it work? ------------------------------------------------------------------------------------------------
$dry_run && { say "dry run: nothing was changed"; exit 0; }
have=$(criu_version) || die "CRIU does not start: $(criu --version 2>&1 | tail -n 1)"
at_least "$have" "$MIN_CRIU" || die "CRIU is $have, $MIN_CRIU or later is needed; $(command -v criu) comes first in PATH"
criu check >"$work/check.log" 2>&1 || { tail -n 5 "$work/check.log" >&2; die "criu check fails on this kernel ($(uname -r))"; }
podman info --format '{{.Host.OCIRuntime.Name}}' >"$work/info" 2>"$work/info.err" ||
  { cat "$work/info.err" >&2; die "podman info fails"; }
say "ready: $(podman --version), $(cat "$work/info"), CRIU $have, kernel $(uname -r)"

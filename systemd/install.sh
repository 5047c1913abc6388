#!/usr/bin/env bash
# Puts this version of warmpool beside earlier ones and makes it the current one:
#
#   systemd/install.sh [PREFIX [PYTHON [EXTRAS]]]      (/opt/warmpool, python3, none; EXTRAS as in "gpu,otel")
#
# PREFIX/versions/VERSION-TIME is a virtual environment of its own, PREFIX/current a link that is switched in one step
# when the new one works. The version before stays, since a running warmpool uses its files, and to go back to: point the
# link at it and restart. Nothing else of the host is touched; `warmpool install` puts systemd's units in place.
set -euo pipefail
prefix=${1:-/opt/warmpool} python=${2:-python3} extras=${3:-}
source=$(cd "$(dirname "$0")/.." && pwd)

say() { printf 'install: %s\n' "$*"; }
die() { printf 'install: error: %s\n' "$*" >&2; exit 1; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "$python is older than Python 3.11"
"$python" -c 'import ensurepip, venv' 2>/dev/null || die "$python has no venv; on Debian and Ubuntu: apt-get install python3-venv"
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' "$source/pyproject.toml")
target=$prefix/versions/$version-$(date -u +%Y%m%d%H%M%S)
mkdir -p "$prefix/versions" || die "cannot write to $prefix; run as root or name another folder"
trap '[ $? = 0 ] || rm -rf "$target"' EXIT
say "making $target"
"$python" -m venv "$target"
"$target/bin/pip" install --quiet --disable-pip-version-check "$source${extras:+[$extras]}"
"$target/bin/warmpool" --version
# `man` looks beside the folders of PATH.
mkdir -p "$target/share/man/man1"
"$target/bin/warmpool" man >"$target/share/man/man1/warmpool.1"
before=$(readlink "$prefix/current" || true)
ln -sfn "versions/$(basename "$target")" "$prefix/current.new"
mv -T "$prefix/current.new" "$prefix/current"
say "$prefix/current is now $(basename "$target")${before:+, it was $(basename "$before")}"
# Version folders end in the time they were made.
find "$prefix/versions" -mindepth 1 -maxdepth 1 -type d | sed 's/.*-\([0-9]*\)$/\1 &/' | sort -r | cut -d' ' -f2- |
  while read -r folder; do
    case $(basename "$folder") in
      "$(basename "$target")"|"$(basename "${before:-none}")") ;;
      *) say "removing $(basename "$folder")"; rm -rf "$folder" ;;
    esac
  done
say "next: $prefix/current/bin/warmpool install --yes --start   (once /etc/warmpool/warmpool.toml is there)"

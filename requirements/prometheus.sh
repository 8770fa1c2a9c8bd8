#!/bin/sh
# Bring Debian's prometheus and promtool to build/prometheus, for the tests of dashboards/.
# apt checks the package against Debian's signed index. Nothing is installed and no service starts,
# so root is not needed; apt's own lists and cache stay as they are.
set -eu
cd "$(dirname "$0")/.."
target=build/prometheus
if command -v prometheus >/dev/null && command -v promtool >/dev/null; then
    exit 0
fi
if [ -x "$target/usr/bin/promtool" ] && "$target/usr/bin/promtool" --version >/dev/null 2>&1; then
    exit 0
fi
if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
    echo "prometheus and promtool are missing: install Prometheus 2.42 or newer" >&2
    exit 1
fi
apt=$PWD/build/apt
rm -rf "$apt" "$target" "$target.new"
mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial" "$apt/download"
private() {
    apt-get -qq -o "Dir::State::lists=$apt/lists" -o "Dir::Cache=$apt/cache" \
        -o APT::Sandbox::User="$(id -un)" "$@"
}
private update
(cd "$apt/download" && private download prometheus)
dpkg-deb -x "$apt"/download/prometheus_*.deb "$target.new"
"$target.new/usr/bin/promtool" --version
mv "$target.new" "$target"
rm -rf "$apt"

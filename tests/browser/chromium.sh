#!/bin/sh
# chromium.sh FOLDER: print the path of a Chromium, from PATH or else of Debian's packages.
# Root installs the packages; anyone else has them unpacked into FOLDER, with all that the system lacks of what they need.
set -eu
folder=$1
apt_log=$(mktemp)
trap 'rm -f "$apt_log"' EXIT

refuse() {
    cat "$apt_log" >&2
    echo "test-browser: $1; it needs a chromium on PATH, or apt with Debian's packages" >&2
    exit 1
}

# apt with lists and archives of its own, so that it needs no right to write the system's.
private_apt() {
    apt-get -q -o Dir::State::Lists="$folder/lists" -o Dir::Cache="$folder/cache" -o Debug::NoLocking=1 \
        -o APT::Get::List-Cleanup=0 -o APT::Sandbox::User="" "$@"
}

unpack() {
    rm -rf "$folder"
    mkdir -p "$folder/lists/partial" "$folder/cache/archives/partial" "$folder/debs" "$folder/root"
    private_apt update >"$apt_log" 2>&1 || refuse "the lists of packages cannot be read"
    private_apt install --simulate --no-install-recommends chromium fonts-dejavu-core >"$apt_log" 2>&1 ||
        refuse "apt has no package chromium that can be installed here"
    packages=$(sed -n 's/^Inst \([^ ]*\).*/\1/p' "$apt_log")
    # shellcheck disable=SC2086  # one word a package
    (cd "$folder/debs" && private_apt download $packages) >"$apt_log" 2>&1 || refuse "a package cannot be downloaded"
    for deb in "$folder"/debs/*.deb; do dpkg-deb -x "$deb" "$folder/root"; done
    rm -rf "$folder/lists" "$folder/cache" "$folder/debs"
}

# The browser starts in an environment where it finds the unpacked libraries and fonts beside the system's.
write_launcher() {
    fonts=$folder/fonts.conf
    cat >"$fonts" <<XML
<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig>
<include ignore_missing="yes">/etc/fonts/fonts.conf</include>
<dir>$folder/root/usr/share/fonts</dir>
<cachedir>$folder/font-cache</cachedir>
</fontconfig>
XML
    libraries=$(find "$folder/root" -name '*.so*' -exec dirname {} + | sort -u | paste -sd: -)
    cat >"$folder/chromium" <<SH
#!/bin/sh
export LD_LIBRARY_PATH="$libraries" FONTCONFIG_FILE="$fonts"
exec "$folder/root/usr/lib/chromium/chromium" "\$@"
SH
    chmod +x "$folder/chromium"
}

if command -v chromium; then
    exit
fi
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
if [ -x "$folder/chromium" ] && "$folder/chromium" --version >"$apt_log" 2>&1; then
    echo "$folder/chromium"
    exit
fi
command -v apt-get >"$apt_log" || refuse "there is no apt-get here"
echo "test-browser: installs Chromium from Debian's packages" >&2
if [ "$(id -u)" = 0 ]; then
    apt-get -q update >"$apt_log" 2>&1 || refuse "the lists of packages cannot be read"
    DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends chromium fonts-dejavu-core \
        >"$apt_log" 2>&1 || refuse "apt has no package chromium that can be installed here"
    command -v chromium || refuse "the package chromium has no program chromium"
else
    unpack
    write_launcher
    "$folder/chromium" --version >"$apt_log" 2>&1 || refuse "the unpacked Chromium does not start"
    echo "$folder/chromium"
fi

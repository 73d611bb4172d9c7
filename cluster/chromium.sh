#!/usr/bin/env bash
# A headless Chromium for the browser tests, from an npm package: cluster/chromium.sh DIR
#
# DIR holds `chromium`, the libraries it may miss (`al2023/lib`) and a font, 210 MB; where it is there already, nothing happens.
# Needs node and npm, and no rights beyond those of the user.
set -euo pipefail
directory=$1
package=@sparticuz/chromium@153.0.0
[ -x "$directory/chromium" ] && exit 0

making=$directory.making
rm -rf "$directory" "$making"
mkdir -p "$making"
making=$(cd "$making" && pwd)
trap 'rm -rf "$making"' EXIT
npm install --silent --no-save --no-audit --no-fund --ignore-scripts --prefix "$making" "$package"
cat >"$making/unpack.mjs" <<'END'
import { inflate } from "@sparticuz/chromium";
for (const name of ["chromium.br", "al2023.tar.br", "fonts.tar.br"]) await inflate(`node_modules/@sparticuz/chromium/bin/${name}`);
END
(cd "$making" && TMPDIR=$making node unpack.mjs)
rm -rf "$making"/node_modules "$making"/package*.json "$making/unpack.mjs"
cat >"$making/fonts.conf" <<'END'
<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir prefix="relative">fonts</dir><cachedir prefix="xdg">fontconfig</cachedir></fontconfig>
END
mv "$making" "$directory"

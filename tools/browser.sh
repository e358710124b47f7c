#!/usr/bin/env bash
# Install Chromium, in which the tests and the README's pictures look at the pages, and the font that
# these ask for first. Usage: tools/browser.sh
set -euo pipefail

if command -v chromium || command -v chromium-browser; then
    exit
fi
install="apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-inter"
if command -v apt-get >/dev/null && [[ $EUID -eq 0 ]]; then
    sh -xc "$install"
elif command -v apt-get >/dev/null && sudo -n true 2>/dev/null; then
    sudo sh -xc "$install"
else
    echo "error: Chromium is missing, and installing it takes root. Nothing was changed. Install it so:" >&2
    echo "    sudo sh -c '$install'" >&2
    exit 1
fi

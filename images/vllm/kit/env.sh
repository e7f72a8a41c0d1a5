# shellcheck shell=bash
# Sourced by every step of a build: what holds for the build alone, and stays out of the image.
export DEBIAN_FRONTEND=noninteractive
export PIP_BREAK_SYSTEM_PACKAGES=1 PIP_CACHE_DIR=/cache/pip PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
export PIP_PROGRESS_BAR=off
export CCACHE_DIR=/cache/ccache CCACHE_COMPILERCHECK=content
if [ -s /run/secrets/ca ]; then
    export CURL_CA_BUNDLE=/run/secrets/ca GIT_SSL_CAINFO=/run/secrets/ca PIP_CERT=/run/secrets/ca
    export REQUESTS_CA_BUNDLE=/run/secrets/ca SSL_CERT_FILE=/run/secrets/ca
fi
if [ -s /run/secrets/index ]; then
    PIP_INDEX_URL=$(cat /run/secrets/index)
    export PIP_INDEX_URL
fi

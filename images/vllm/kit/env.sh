# shellcheck shell=bash
# Sourced by every step of a build: what holds for the build alone, and stays out of the image.
export DEBIAN_FRONTEND=noninteractive
export PIP_BREAK_SYSTEM_PACKAGES=1 PIP_CACHE_DIR=/cache/pip PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
export PIP_PROGRESS_BAR=off
export CCACHE_DIR=/cache/ccache CCACHE_COMPILERCHECK=content
# Without BuildKit there is no cache mount: a cache would end up in a layer.
[ -d /cache/pip ] || export PIP_NO_CACHE_DIR=1
[ -d /cache/ccache ] || export CCACHE_DISABLE=1
# Secrets of BuildKit's, or what a plain build has in the kit's folder.
for site in /run/secrets /kit; do
    if [ -s $site/ca ]; then
        export CURL_CA_BUNDLE=$site/ca GIT_SSL_CAINFO=$site/ca PIP_CERT=$site/ca
        export REQUESTS_CA_BUNDLE=$site/ca SSL_CERT_FILE=$site/ca
    fi
    if [ -s $site/index ]; then
        PIP_INDEX_URL=$(cat $site/index)
        export PIP_INDEX_URL
    fi
done

#!/bin/bash
# Build the images with docker or buildah, whichever is here:
#   docker/build.sh cpu                                    -> hvdtrain:<version>-cpu
#   docker/build.sh cuda --build-arg CUDA_ARCH=8.0,9.0     -> hvdtrain:<version>-cuda
# Words after the device go to the builder as they are. ENGINE=docker|buildah chooses, REPOSITORY names the image.
set -euo pipefail
cd "$(dirname "$0")/.."

device=${1:-}
case "$device" in
    cpu | cuda) shift ;;
    *) sed -n '2,5s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
engine=${ENGINE:-}
if [ -z "$engine" ]; then
    for engine in docker buildah ""; do
        if [ -z "$engine" ]; then echo "neither docker nor buildah is here; install one of them" >&2; exit 1; fi
        if [ "$engine" = docker ] && ! docker info >/dev/null 2>&1; then continue; fi
        if command -v "$engine" >/dev/null; then break; fi
    done
fi
version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' hvdtrain/version.py)
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
tag=${REPOSITORY:-hvdtrain}:$version-$device
common=(--file docker/Dockerfile --build-arg "DEVICE=$device" --build-arg "VERSION=$version"
    --build-arg "REVISION=$revision" --tag "$tag")

if [ "$engine" = docker ]; then
    DOCKER_BUILDKIT=1 docker build "${common[@]}" "$@" .
else
    # format docker: an OCI image has no room for a health check.
    buildah build --format docker --ignorefile docker/Dockerfile.dockerignore "${common[@]}" "$@" .
fi
echo "$tag"

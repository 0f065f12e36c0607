#!/bin/bash
# A worker is healthy when its sshd answers; whatever else runs here, when Python finds hvdtrain.
set -euo pipefail
if tr '\0' ' ' < /proc/1/cmdline | grep -q 'entrypoint.sh sshd'; then
    exec 3<> "/dev/tcp/127.0.0.1/${HVDTRAIN_SSH_PORT:-2222}"
    read -r -t 4 greeting <&3
    [[ "$greeting" = SSH-* ]]
else
    hvdtrain --version > /dev/null
fi

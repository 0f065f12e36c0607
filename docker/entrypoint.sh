#!/bin/bash
# What a container of the hvdtrain image does first: give the user a name, get the SSH keys ready, then
#   sshd              wait for mpirun or horovodrun of another host (a worker)
#   mpirun, mpiexec, horovodrun, torchrun    run it under `hvdtrain guard`
#   anything else     run it
# Keys: mounted at $HVDTRAIN_SSH_KEYS (id_ed25519, and id_ed25519.pub or authorized_keys; a Kubernetes secret's
# ssh-privatekey and ssh-publickey do too), or, with HVDTRAIN_SSH=shared, made by the first container in that folder, which
# all share. Nothing is baked into the image. Hosts prove themselves by the job's own key, or by a known_hosts that is mounted;
# HVDTRAIN_SSH_HOST_KEYS=unchecked turns that off.
set -euo pipefail

keys=${HVDTRAIN_SSH_KEYS:-/run/hvdtrain/ssh}
port=${HVDTRAIN_SSH_PORT:-2222}
umask 077

fail() { echo "entrypoint: $*" >&2; exit 2; }

if [ ! -w "$HOME" ]; then
    HOME=$(mktemp -d /tmp/home.XXXXXX)
    export HOME
fi

# An arbitrary UID (docker run --user, OpenShift) has no name, and without one ssh and sshd do not work.
if ! id -un >/dev/null 2>&1; then
    NSS_WRAPPER_PASSWD=$HOME/.passwd
    NSS_WRAPPER_GROUP=/etc/group
    { grep -v '^trainer:' /etc/passwd; echo "trainer:x:$(id -u):$(id -g):trainer:$HOME:/bin/bash"; } > "$NSS_WRAPPER_PASSWD"
    LD_PRELOAD=libnss_wrapper.so
    export NSS_WRAPPER_PASSWD NSS_WRAPPER_GROUP LD_PRELOAD
fi

make_shared_keys() {
    mkdir -p "$keys" 2>/dev/null || fail "HVDTRAIN_SSH=shared: $keys cannot be written; mount a volume there that all containers share"
    # Only one container makes them: mkdir succeeds once. The others wait for the last file.
    if mkdir "$keys/.making" 2>/dev/null; then
        ssh-keygen -q -t ed25519 -N '' -C hvdtrain -f "$keys/.new"
        mv "$keys/.new" "$keys/id_ed25519"
        mv "$keys/.new.pub" "$keys/id_ed25519.pub"
    fi
    for _ in $(seq 100); do
        if [ -e "$keys/id_ed25519.pub" ]; then return; fi
        sleep 0.1
    done
    fail "HVDTRAIN_SSH=shared: no key appeared in $keys within 10 s; another container began to make it and ended: remove $keys/.making"
}

first_of() {
    for name in "$@"; do
        if [ -r "$keys/$name" ]; then echo "$keys/$name"; return; fi
    done
}

prepare_ssh() {
    if [ "${HVDTRAIN_SSH:-}" = shared ]; then make_shared_keys; fi
    private=$(first_of id_ed25519 id_rsa ssh-privatekey)
    public=$(first_of authorized_keys id_ed25519.pub id_rsa.pub ssh-publickey)
    mkdir -p "$HOME/.ssh"
    if [ -n "$private" ]; then
        install -m 600 "$private" "$HOME/.ssh/id_hvdtrain"
        [ -n "$public" ] || public=<(ssh-keygen -y -f "$HOME/.ssh/id_hvdtrain")
    fi
    if [ -n "$public" ]; then cat "$public" > "$HOME/.ssh/authorized_keys"; fi
    [ -n "$private" ] || [ -n "$public" ] || return 1
    # The hosts of a job come and go, but all of them have the job's private key: their sshd shows it as its host key.
    checking="StrictHostKeyChecking yes
    GlobalKnownHostsFile /dev/null
    UserKnownHostsFile $HOME/.ssh/known_hosts_hvdtrain"
    if [ "${HVDTRAIN_SSH_HOST_KEYS:-}" = unchecked ]; then
        checking="StrictHostKeyChecking no
    UserKnownHostsFile /dev/null"
    elif [ -r "$keys/known_hosts" ]; then
        checking="StrictHostKeyChecking yes
    UserKnownHostsFile $keys/known_hosts"
    elif [ -r "$keys/ssh_host_ed25519_key.pub" ]; then
        echo "* $(cat "$keys/ssh_host_ed25519_key.pub")" > "$HOME/.ssh/known_hosts_hvdtrain"
    elif [ -n "$private" ]; then
        echo "* $(ssh-keygen -y -f "$HOME/.ssh/id_hvdtrain")" > "$HOME/.ssh/known_hosts_hvdtrain"
    fi
    cat > "$HOME/.ssh/config" <<CONFIG
Host *
    Port $port
    IdentityFile $HOME/.ssh/id_hvdtrain
    IdentitiesOnly yes
    BatchMode yes
    ConnectTimeout 10
    ConnectionAttempts 5
    LogLevel ERROR
    $checking
CONFIG
}

# Whether sshd can be strict about who may write the file of keys: an arbitrary UID does not own the home folder.
strict_modes() {
    if [ "$(stat -c %u "$HOME")" = "$(id -u)" ]; then chmod go-w "$HOME"; fi
    if [ "$(getent passwd "$(id -u)" | cut -d: -f6)" != "$HOME" ]; then echo no; return; fi
    for place in "$HOME" "$HOME/.ssh" "$HOME/.ssh/authorized_keys"; do
        case "$(stat -c %u "$place")" in 0 | "$(id -u)") ;; *) echo no; return ;; esac
        if [ $((0$(stat -c %a "$place") & 022)) != 0 ]; then echo no; return; fi
    done
    echo yes
}

prepared=no
if prepare_ssh; then prepared=yes; fi

if [ "${1:-}" = sshd ]; then
    shift
    [ "$prepared" = yes ] || fail "sshd needs a key: mount one at $keys, or share a volume there with HVDTRAIN_SSH=shared"
    state=$(mktemp -d /tmp/sshd.XXXXXX)
    if [ -r "$keys/ssh_host_ed25519_key" ]; then
        install -m 600 "$keys/ssh_host_ed25519_key" "$state/host_key"
    elif [ -r "$HOME/.ssh/id_hvdtrain" ]; then
        install -m 600 "$HOME/.ssh/id_hvdtrain" "$state/host_key"
    else
        echo "entrypoint: no private key here, so hosts that log in need a known_hosts or HVDTRAIN_SSH_HOST_KEYS=unchecked" >&2
        ssh-keygen -q -t ed25519 -N '' -f "$state/host_key"
    fi
    # A login starts with an empty environment; the ranks need this container's.
    export HVDTRAIN_SSH_PORT=$port
    forwarded="PATH=$PATH VIRTUAL_ENV=${VIRTUAL_ENV:-} HOME=$HOME"
    if [ -n "${LD_PRELOAD:-}" ]; then
        forwarded="$forwarded LD_PRELOAD=$LD_PRELOAD NSS_WRAPPER_PASSWD=$NSS_WRAPPER_PASSWD NSS_WRAPPER_GROUP=$NSS_WRAPPER_GROUP"
    fi
    for name in ${!NCCL_*} ${!HOROVOD_*} ${!HVDTRAIN_*} ${!OMPI_*} ${!PRTE_*} ${!GLOO_*} ${!NVIDIA_*} CUDA_VISIBLE_DEVICES LD_LIBRARY_PATH OMP_NUM_THREADS; do
        value=${!name-}
        case "$value" in "" | *[[:space:]\"]*) continue ;; esac
        forwarded="$forwarded $name=$value"
    done
    cat > "$state/sshd_config" <<CONFIG
Port $port
ListenAddress ${HVDTRAIN_SSH_LISTEN:-0.0.0.0}
HostKey $state/host_key
PidFile $state/pid
AuthorizedKeysFile $HOME/.ssh/authorized_keys
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
UsePAM no
StrictModes $(strict_modes)
DisableForwarding yes
PermitTunnel no
PermitUserRC no
PrintMotd no
MaxStartups 200:30:400
SetEnv $forwarded
CONFIG
    if [ "$(id -u)" = 0 ]; then mkdir -p /run/sshd; fi
    echo "entrypoint: sshd of $(id -un) on port $port"
    umask 022
    exec /usr/sbin/sshd -D -e -f "$state/sshd_config" "$@"
fi

umask 022
# What the container's end means to a launcher differs; under guard it is a checkpoint and exit code 75.
case "${1##*/}" in
    mpirun | mpiexec | horovodrun | torchrun) set -- python -m hvdtrain guard "$@" ;;
esac
exec "$@"

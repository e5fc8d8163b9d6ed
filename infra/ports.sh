# free_port NAME PORT VARIABLE: say in one line that a port is taken, and what to do, and stop.
free_port() {
    if python - "$2" <<'PY'
import socket, sys
with socket.socket() as s:
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        s.bind(("127.0.0.1", int(sys.argv[1])))
    except OSError:
        sys.exit(1)
PY
    then return 0; fi
    echo "dllm: port $2 for $1 is taken on 127.0.0.1; stop what holds it, or choose another: make ... $3=NUMBER" >&2
    exit 4
}

# up NAME URL PID LOG: wait until an address answers.
up() {
    for _ in $(seq 300); do
        if python -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)' "$2" 2>/dev/null; then
            return 0
        fi
        kill -0 "$3" 2>/dev/null || break
        sleep 1
    done
    echo "dllm: $1 did not come up; its log: $4" >&2
    exit 4
}

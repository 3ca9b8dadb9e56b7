#!/usr/bin/env bash
# On the head of a cluster: starts Prometheus and Grafana with what Ray writes for them, and adds
# this project's dashboard. Both listen on loopback alone; `ray dashboard` and ssh bring them here.
#
#   jobs/start_dashboards.sh FOLDER_OF_PROMETHEUS FOLDER_OF_GRAFANA
set -euo pipefail
prometheus=$1 grafana=$2
metrics=/tmp/ray/session_latest/metrics

for _ in $(seq 60); do # Ray's dashboard writes these files a moment after it starts
    [ -e $metrics/grafana/grafana.ini ] && [ -e $metrics/prometheus/prometheus.yml ] && break
    sleep 1
done
cp "$(dirname "$0")/configs/grafana.json" $metrics/grafana/dashboards/llava_ray.json

start() { # NAME COMMAND...: replaces the one that an earlier `ray up` started
    local pid_file=~/$1.pid
    [ -e "$pid_file" ] && kill "$(cat "$pid_file")" 2>/dev/null && sleep 2
    setsid nohup "${@:2}" >~/"$1".log 2>&1 </dev/null &
    echo $! >"$pid_file"
}
start prometheus "$prometheus/prometheus" --web.listen-address=127.0.0.1:9090 \
    --config.file=$metrics/prometheus/prometheus.yml --storage.tsdb.path="$prometheus/data"
start grafana env GF_SERVER_HTTP_ADDR=127.0.0.1 "$grafana/bin/grafana" server \
    --homepath "$grafana" --config $metrics/grafana/grafana.ini

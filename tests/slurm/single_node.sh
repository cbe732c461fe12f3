#!/usr/bin/env bash
# A Slurm of one node on the loopback, for tests: single_node.sh start|stop FOLDER
# Debian: apt-get install slurmctld slurmd munge slurm-client. Needs root; no cgroups, no systemd.
# `start` prints the line to evaluate in the shell that uses it; exit status 3: it cannot run here.
set -e
action=$1; folder=$(realpath -m "$2")
export SLURM_CONF=$folder/slurm.conf
if [ "$action" = stop ]; then
  for file in slurmd slurmctld munged; do
    [ -f "$folder/$file.pid" ] && kill "$(cat "$folder/$file.pid")" 2>/dev/null || true
  done
  sleep 2
  for process in $(pgrep 'slurm|srun|munged'); do  # a step that hangs keeps slurmd waiting
    grep -qs "$folder" "/proc/$process/environ" "/proc/$process/cmdline" && kill -9 "$process" || true
  done
  exit 0
fi
for program in slurmctld slurmd munged sbatch squeue; do
  PATH=$PATH:/usr/sbin command -v $program >/dev/null || { echo "no $program; install slurmctld, slurmd, munge and slurm-client" >&2; exit 3; }
done
[ "$(id -u)" = 0 ] || { echo "only root can start slurmd" >&2; exit 3; }
PATH=$PATH:/usr/sbin
mkdir -p "$folder"/{state,spool,munge}
chmod 755 "$folder"; chmod 700 "$folder/munge"
dd if=/dev/urandom of="$folder/munge/key" bs=1024 count=1 2>/dev/null; chmod 600 "$folder/munge/key"
socket=$folder/munge/socket
munged --force --num-threads=1 --key-file="$folder/munge/key" --socket="$socket" \
  --pid-file="$folder/munged.pid" --log-file="$folder/munge/log" --seed-file="$folder/munge/seed"
port=$((20000 + RANDOM % 20000))
cat > "$SLURM_CONF" <<CONF
ClusterName=loopback
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$socket
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
SwitchType=switch/none
KillWait=30
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
CONF
slurmctld -i && slurmd
for _ in $(seq 60); do
  [ "$(sinfo -h -o %t 2>/dev/null)" = idle ] && { echo "export SLURM_CONF=$SLURM_CONF"; exit 0; }
  sleep 0.5
done
echo "the node does not become idle: $(tail -n 1 "$folder/slurmctld.log")" >&2
exit 3

#!/system/bin/sh
# Run one program on a phone and watch it: sh measure.sh RUN SECONDS PROGRAM ARGUMENT...
#
# The program ends with the connection: adbd sends this shell a SIGHUP where that is lost (shell_service.cpp).
#
# Writes into the folder RUN: out and err (what the program prints), code (its exit code; a signal is 128 more),
# hung (exists where it was ended after SECONDS), pid, and samples: a line about every 0.2 s of
#   uptime_s VmHWM_kB RssAnon_kB RssFile_kB current_uA voltage_uV battery_status
# with "-" for what cannot be read. Only builtins and sleep run while the program does.
run=$1 limit=$2
shift 2
battery=/sys/class/power_supply/battery

uptime() {
    read -r up rest </proc/uptime
}

value() { # value FILE: its first word, or "-"
    word=-
    [ -r "$1" ] && read -r word rest <"$1"
    [ -n "$word" ] || word=-
}

memory() { # of the program; fails where it has ended
    state=Z peak=- anonymous=- mapped=-
    while read -r key number unit; do
        case $key in
            State:) state=$number ;;
            VmHWM:) peak=$number ;;
            RssAnon:) anonymous=$number ;;
            RssFile:) mapped=$number ;;
        esac
    done 2>/dev/null <"/proc/$pid/status"
    [ "$state" != Z ]
}

rm -rf "$run"
mkdir -p "$run" || exit 1
uptime
end=$((${up%.*} + limit))
trap 'kill -9 $! 2>/dev/null; rm -f "$run/pid"; exit 129' HUP
"$@" >"$run/out" 2>"$run/err" </dev/null &
pid=$!
echo $pid >"$run/pid"
while memory 2>/dev/null; do
    uptime
    value $battery/current_now && current=$word
    value $battery/voltage_now && voltage=$word
    value $battery/status && charging=$word
    echo "$up $peak $anonymous $mapped $current $voltage $charging"
    if [ "${up%.*}" -ge $end ]; then
        : >"$run/hung"
        kill -9 $pid
        break
    fi
    sleep 0.2
done >"$run/samples"
wait $pid
echo $? >"$run/code"
rm -f "$run/pid"

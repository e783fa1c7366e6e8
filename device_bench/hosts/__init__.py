"""Where a job's process runs: this machine, one behind ssh, a phone behind adb, a browser page."""

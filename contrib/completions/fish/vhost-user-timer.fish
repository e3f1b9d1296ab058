complete -c vhost-user-timer -l socket-path -d 'Listen on a Unix socket at this path. A socket there on which no process listens is replaced' -r -F
complete -c vhost-user-timer -l fd -d 'Serve on this inherited descriptor, a Unix stream socket. A listening socket is served like a path; a connected one has one frontend, and the process ends with the last frontend of its connected sockets' -r
complete -c vhost-user-timer -l rtc-socket-path -d 'Give the guest a clock: listen at this path for a VMM\'s virtio-rtc device. Works beside the timer device or alone' -r -F
complete -c vhost-user-timer -l rtc-fd -d 'Give the guest a clock: serve on this inherited descriptor, as --fd does' -r
complete -c vhost-user-timer -l socket-group -d 'Give sockets at a path to this group, by name or gid, so that a VMM of another user can connect. Their mode is then 0660, unless --socket-mode says otherwise' -r
complete -c vhost-user-timer -l socket-mode -d 'Make sockets at a path with this mode, octal. Connecting needs the write permission [default: 0600, or 0660 with --socket-group]' -r
complete -c vhost-user-timer -l allow-uid -d 'Serve frontends of this user only, by name or uid; repeat the option for more users. Others are disconnected, and the log says so: at once, or, as each socket serves one frontend at a time, when the frontend before them has left. Also on inherited sockets: the user of a connected one is the user that made the socket pair. Without the option every user that can reach the socket is served' -r
complete -c vhost-user-timer -l pid-file -d 'Write the process id to this file once all sockets are ready, and remove the file in the end. A file there that a process has left behind is replaced' -r -F
complete -c vhost-user-timer -l rtc-clock -d 'Tell the guest what the host\'s wall clock does at a leap second [default: with a state file the kind of the clock in it, otherwise utc if the kernel knows TAI and maybe-smeared if not]. Linux guests make an RTC only of a smeared clock' -r -f -a "utc\t'Steps, as UTC does'
smeared\t'Runs slower or faster for a while, and never steps'
maybe-smeared\t'Steps or smears: not known'"
complete -c vhost-user-timer -l rtc-counter-offset -d 'Use this counter offset, in ticks, for a VM that is not configured over the timer device: its virtual counter is the host counter minus the offset. Lets the guest read a clock and its counter at one instant' -r
complete -c vhost-user-timer -l max-vcpus -d 'Accept VMs with up to this many vCPUs, 1 to 4096' -r
complete -c vhost-user-timer -l request-queues -d 'Offer this many request queues, 1 to 16' -r
complete -c vhost-user-timer -l counter-frequency -d 'Accept only VMs with this counter frequency, in Hz. Without the option any frequency is accepted, and a VM that names none gets the counter source\'s own' -r
complete -c vhost-user-timer -l counter-source -d 'Derive the host counter from this source. A VMM that puts the VM\'s offset into KVM needs cntvct. auto: with a state file, the source of the VM in it; otherwise cntvct on AArch64, as the guest\'s counter is an offset of it, and monotonic elsewhere' -r -f -a "auto\t''
monotonic\t''
boottime\t''
tsc\t''
cntvct\t''"
complete -c vhost-user-timer -l state-file -d 'Keep the VM in this file, so that it survives a crash of this process: a process started again with the file resumes the VM. Created with mode 0600; best on a tmpfs' -r -F
complete -c vhost-user-timer -l poll-max-us -d 'Busy-poll for up to this many microseconds after a request before sleeping. Adapts to recent traffic; backs off when other tasks want the CPU; 0 turns it off' -r
complete -c vhost-user-timer -l name -d 'Name the VM in each line of the log: up to 255 bytes, without control characters' -r
complete -c vhost-user-timer -l log-level -d 'Log this much on stderr. debug adds each operation that changes the VM and why a request is refused, trace each request; both slow requests down' -r -f -a "off\t''
error\t''
warn\t''
info\t''
debug\t''
trace\t''"
complete -c vhost-user-timer -l terminate -d 'End when the last frontend of all sockets has disconnected, as with a connected --fd. vhost-user-timer-ctl counts as a frontend; a process that connects and sends nothing does not. Not for a VMM that reconnects'
complete -c vhost-user-timer -l print-capabilities -d 'Print what this program can do as JSON, and exit. All other options are ignored'
complete -c vhost-user-timer -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vhost-user-timer -s V -l version -d 'Print version'

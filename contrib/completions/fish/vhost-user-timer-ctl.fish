# Print an optspec for argparse to handle cmd's options that are independent of any subcommand.
function __fish_vhost_user_timer_ctl_global_optspecs
    string join \n json h/help V/version
end

function __fish_vhost_user_timer_ctl_needs_command
    # Figure out if the current invocation already has a command.
    set -l cmd (commandline -opc)
    set -e cmd[1]
    argparse -s (__fish_vhost_user_timer_ctl_global_optspecs) -- $cmd 2>/dev/null
    or return
    if set -q argv[1]
        # Also print the command, so this can be used to figure out what it is.
        echo $argv[1]
        return 1
    end
    return 0
end

function __fish_vhost_user_timer_ctl_using_subcommand
    set -l cmd (__fish_vhost_user_timer_ctl_needs_command)
    test -z "$cmd"
    and return 1
    contains -- $cmd[1] $argv
end

complete -c vhost-user-timer-ctl -n "__fish_vhost_user_timer_ctl_needs_command" -l json -d 'Print JSON'
complete -c vhost-user-timer-ctl -n "__fish_vhost_user_timer_ctl_needs_command" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vhost-user-timer-ctl -n "__fish_vhost_user_timer_ctl_needs_command" -s V -l version -d 'Print version'
complete -c vhost-user-timer-ctl -n "__fish_vhost_user_timer_ctl_needs_command" -f -a "info" -d 'Show the VM\'s state: phase, epoch, vCPUs, frequency, offsets'
complete -c vhost-user-timer-ctl -n "__fish_vhost_user_timer_ctl_needs_command" -f -a "dump" -d 'Show the VM\'s state and the timers of every vCPU, all read at one instant'
complete -c vhost-user-timer-ctl -n "__fish_vhost_user_timer_ctl_using_subcommand info" -l socket-path -d 'Ask the backend at this socket, the one of its timer device' -r -F
complete -c vhost-user-timer-ctl -n "__fish_vhost_user_timer_ctl_using_subcommand info" -l timeout -d 'Wait for up to this many seconds, each time, until the backend accepts the connection and until it answers; more than 0, at most 3600' -r
complete -c vhost-user-timer-ctl -n "__fish_vhost_user_timer_ctl_using_subcommand info" -l json -d 'Print JSON'
complete -c vhost-user-timer-ctl -n "__fish_vhost_user_timer_ctl_using_subcommand info" -s h -l help -d 'Print help'
complete -c vhost-user-timer-ctl -n "__fish_vhost_user_timer_ctl_using_subcommand dump" -l socket-path -d 'Ask the backend at this socket, the one of its timer device' -r -F
complete -c vhost-user-timer-ctl -n "__fish_vhost_user_timer_ctl_using_subcommand dump" -l timeout -d 'Wait for up to this many seconds, each time, until the backend accepts the connection and until it answers; more than 0, at most 3600' -r
complete -c vhost-user-timer-ctl -n "__fish_vhost_user_timer_ctl_using_subcommand dump" -l json -d 'Print JSON'
complete -c vhost-user-timer-ctl -n "__fish_vhost_user_timer_ctl_using_subcommand dump" -s h -l help -d 'Print help'

"""completion: the script by which a shell completes commands, options, VMs and runs."""

from __future__ import annotations

from typing import Final

import click

from reconciler.core.errors import Exit

SCRIPTS: Final = {
    "bash": r"""
# reconciler completion bash > /etc/bash_completion.d/reconciler
# or for one user: > ~/.local/share/bash-completion/completions/reconciler
_reconciler() {
    local IFS=$'\n' current=${COMP_WORDS[COMP_CWORD]} kind words
    COMPREPLY=()
    words=$(_RECONCILER_COMPLETE=bash "${1/#\~/$HOME}" "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
    kind=${words%%$'\n'*}
    [[ $current == = ]] && current=
    case $kind in
        files) compopt -o filenames 2>/dev/null; COMPREPLY=($(compgen -f -- "$current")) ;;
        dirs) compopt -o filenames 2>/dev/null; COMPREPLY=($(compgen -d -- "$current")) ;;
        words) [[ $words == *$'\n'* ]] && COMPREPLY=(${words#*$'\n'}) ;;
    esac
    return 0
}
complete -F _reconciler reconciler
""",
    "zsh": r"""
#compdef reconciler
# reconciler completion zsh > "${fpath[1]}/_reconciler"
_reconciler() {
    local -a lines values
    local line
    lines=("${(@f)$(_RECONCILER_COMPLETE=zsh ${~words[1]} "${(@Q)words[2,CURRENT]}" 2>/dev/null)}")
    [[ $PREFIX == --*=* ]] && compset -P '*='
    case $lines[1] in
        files) _files ;;
        dirs) _files -/ ;;
        words)
            for line in "${(@)lines[2,-1]}"; do
                [[ -n $line ]] || continue
                values+=("${${line%%$'\t'*}//:/\\:}${${(M)line:#*$'\t'*}:+:${line#*$'\t'}}")
            done
            (( $#values )) && _describe -V 'reconciler' values
            ;;
    esac
}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    _reconciler "$@"
else
    compdef _reconciler reconciler
fi
""",
    "fish": r"""
# reconciler completion fish > ~/.config/fish/completions/reconciler.fish
function __reconciler_complete
    set -l before (commandline -opc)
    set -l current (commandline -ct)
    set -l lines (env _RECONCILER_COMPLETE=fish $before[1] $before[2..-1] "$current" 2>/dev/null)
    switch "$lines[1]"
        case files
            __fish_complete_path (string replace -r '^--[^=]*=' '' -- "$current")
        case dirs
            __fish_complete_directories (string replace -r '^--[^=]*=' '' -- "$current")
        case words
            test (count $lines) -gt 1; and printf '%s\n' $lines[2..-1]
    end
end
complete -c reconciler -f -a '(__reconciler_complete)'
""",
}
"""Shell → its script. It asks this command at each Tab, and costs a new shell nothing."""


@click.command()
@click.argument("shell", type=click.Choice(list(SCRIPTS)), metavar="bash|zsh|fish")
def completion(shell: str) -> int:
    """Print the script that completes commands, options, VMs and runs in a shell.

    Put it where the shell looks for such scripts; the first lines of each say where that is. It
    need not be made anew for a new version.
    """
    click.echo(SCRIPTS[shell].lstrip("\n"), nl=False)
    return Exit.OK

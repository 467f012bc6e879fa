"""Shell completion: what may follow a command line, and the scripts by which bash, zsh and fish ask for it."""

from __future__ import annotations

import re
from pathlib import Path

from runner.arguments import CHOICES, FLAGS, read_arguments
from runner.config.command import CONF, PATHS, Command
from runner.config.options import groups, read_yaml
from runner.errors import UserError

# @NAME@ is the command that the shell completes, @PROGRAM@ the one that answers, @START@ how its lines begin
_INSTALL = {
    "bash": r"""_@NAME@_runner_completion() {
    COMPREPLY=()
    [[ $COMP_LINE == *"@START@ "* ]] || return
    local IFS=$'\n'
    COMPREPLY=($(COMP_LINE="${COMP_LINE:0:COMP_POINT}" @PROGRAM@ -sc query=bash 2>/dev/null))
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o default -F _@NAME@_runner_completion @NAME@""",
    "zsh": r"""(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
_@NAME@_runner_completion() {
    [[ "$words[*]" == *"@START@ "* ]] || { _default; return }
    local -a found
    found=(${(f)"$(COMP_LINE="${(j: :)words[1,CURRENT-1]} $PREFIX" @PROGRAM@ -sc query=zsh 2>/dev/null)"})
    compadd -Q -S '' -- $found
}
compdef _@NAME@_runner_completion @NAME@""",
    "fish": r"""function _@NAME@_runner_completion
    set -lx COMP_LINE (commandline -cp)
    string match -q -- "*@START@ *" $COMP_LINE; and @PROGRAM@ -sc query=fish 2>/dev/null
end
complete -c @NAME@ -n 'string match -q -- "*@START@ *" (commandline -cp)' -f -a '(_@NAME@_runner_completion)'""",
}
_UNINSTALL = {
    "bash": "complete -r @NAME@; unset -f _@NAME@_runner_completion",
    "zsh": "compdef -d @NAME@; unfunction _@NAME@_runner_completion",
    "fish": "complete -e -c @NAME@; functions -e _@NAME@_runner_completion",
}
_MODES = ("train", "eval", "compare")


def completion_script(action: str, shell: str, program: str) -> str:
    """Return what a shell evaluates to complete the program, or no longer to do so.

    Raises:
        UserError: there is no such action or shell.
    """
    scripts = {"install": _INSTALL, "uninstall": _UNINSTALL}.get(action, {})
    if shell not in scripts:
        install = f'eval "$({program} -sc install=bash)"'
        raise UserError(f"expected -sc install=bash (or zsh, fish), got -sc {action}={shell}: {install}")
    name, *rest = program.split(" ", 1)
    name = Path(name).name
    start = " ".join([name, *rest])
    values = {"@NAME@": name, "@START@": start, "@PROGRAM@": program}
    return re.sub(r"@\w+@", lambda match: values[match[0]], scripts[shell])


def candidates(line: str) -> list[str]:
    """Return what the last word of a command line may become."""
    *words, word = line.split(" ")
    words = [typed for typed in words if typed]
    words = words[3:] if words[1:3] == ["-m", "runner"] else words[1:]
    before = words[-1] if words else ""

    # a flag, or its value
    if word.startswith("-"):
        return _beginning(word, [names[0] for names in FLAGS])
    flag = next((names[0].removeprefix("--") for names in FLAGS if before in names), "")
    if flag == "config-dir":
        return _paths("", word)
    if flag in CHOICES:
        return _beginning(word, CHOICES[flag])

    # an override
    try:
        arguments = read_arguments([typed for typed in words if typed != before or "=" in typed or not flag])
    except UserError:
        return []
    if arguments.config_dir is not None and not arguments.config_dir.is_dir():
        return []
    command = Command([], arguments.config_dir)
    key, equals, value = word.partition("=")
    if equals and (key in PATHS or value.startswith(("/", ".", "~"))):
        files = ".pt" if key == "checkpoint" else None if key in PATHS else ""
        return _paths(f"{key}=", value, files)
    if key == "mode" and equals:
        modes = [*_MODES, *_own_modes(arguments.overrides, command)]
        return _beginning(word, [f"mode={mode}" for mode in modes])
    from runner.config.show import matches

    return matches(word, arguments.overrides, command)


def _beginning(word: str, names: list[str] | tuple[str, ...]) -> list[str]:
    return [name for name in names if name.startswith(word)]


def _paths(prefix: str, typed: str, files: str | None = None) -> list[str]:
    """Return the folders whose path begins as typed, and the files that end with `files`."""
    folder, slash, name = typed.rpartition("/")
    place = Path(f"{folder}{slash}" or ".").expanduser()
    entries = sorted(place.iterdir()) if place.is_dir() else []
    shown = [entry for entry in entries if name.startswith(".") or not entry.name.startswith(".")]
    return [
        f"{prefix}{folder}{slash}{entry.name}{'/' * entry.is_dir()}"
        for entry in shown
        if entry.name.startswith(name)
        and (entry.is_dir() or (files is not None and entry.name.endswith(files)))
    ]


def _own_modes(words: list[str], command: Command) -> list[str]:
    """Return the modes that the task of the chosen experiment, or of any, declares; its code is only read."""
    experiments = groups(command)["experiment"]
    chosen = [word.partition("=")[2] for word in words if word.startswith("experiment=")][-1:]
    modes: dict[str, None] = {}
    for file in (experiments[name] for name in chosen or experiments if name in experiments):
        task = read_yaml(file).get("task")
        target = task.get("_target_", "") if isinstance(task, dict) else ""
        folder = CONF.parent if CONF in file.parents else file.parents[1]
        module = folder.joinpath(*str(target).split(".")[:-1])
        for code in (module.with_suffix(".py"), *module.glob("*.py")):
            source = code.read_text(encoding="utf-8") if code.is_file() else ""
            for match in re.finditer(r"^    modes\b[^=\n]*=\s*\(([^)]*)\)", source, re.MULTILINE):
                modes |= dict.fromkeys(re.findall(r"[\"'](\w+)[\"']", match[1]))
    return list(modes)

"""The console script: fast help, lazy imports, one code path with `python -m batchcls.jobs.NAME`."""

import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from batchcls import __version__
from batchcls.cli import main as module
from batchcls.cli.app import Command, parser_of, run
from batchcls.cli.completion import completion_script
from batchcls.config.common_config import JobConfig
from batchcls.errors import BatchclsError, ExitCode
from tests.conftest import REPOSITORY

HEAVY = ("ray", "torch", "pyarrow", "pydantic", "rich")


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["batchcls", *arguments])
    try:
        module.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture(scope="module")
def jobs() -> dict[str, list[Command]]:
    return {job: list(module.commands_of(job)) for job in module.JOBS}


def test_help_lists_every_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    assert call(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    files = {path.stem for path in (REPOSITORY / "batchcls" / "jobs").glob("*.py")}
    work = {f"{job}_run" for job in ("bundle", "classify", "compare", "evaluate", "finetune")}
    work |= {"classify_models", "classify_plan", "classify_reuse", "evaluate_cascade", "input_check"}
    assert files - {"__init__"} - work == set(module.JOBS)
    assert all(f"\n  {job} " in text for job in [*module.JOBS, "completion"])
    assert call(monkeypatch) == 0
    assert capsys.readouterr().out == text


def test_version_is_that_of_the_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    assert call(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"batchcls {__version__}\n"


@pytest.mark.parametrize(
    "words",
    [[], ["completion"], *([job] for job in module.JOBS), ["runs", "list"], ["bundle", "create"]],
    ids=" ".join,
)
def test_every_command_accepts_the_flags_for_help_and_version(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
):
    # The real `app.main` ends the process.
    monkeypatch.setattr("batchcls.cli.app.main", run)
    texts = {}
    for flag in ("--help", "-h", "--help-all", "--version"):
        assert call(monkeypatch, *words, flag) == 0
        texts[flag] = capsys.readouterr().out
    assert texts["--help"] == texts["-h"]
    assert texts["--help"].startswith(" ".join(["usage: batchcls", *words]))
    if words == ["classify"]:
        assert "--help-all" in texts["--help"]
        assert len(texts["--help-all"]) > len(texts["--help"])
    else:
        assert texts["--help-all"] == texts["--help"]
    assert texts["--version"] == f"batchcls {__version__}\n"


@pytest.mark.parametrize("name", ["batchcls", "batchcls.cli.main"])
def test_the_package_can_be_run_as_a_module(name: str):
    command = [sys.executable, "-m", name, "--version"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"batchcls {__version__}\n"), done.stderr


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version_import_nothing_heavy(flag: str):
    code = (
        "import sys; from batchcls.cli.main import main\n"
        f"sys.argv = ['batchcls', {flag!r}]; main()\n"
        f"assert not set({HEAVY!r}) & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_unknown_command_suggests_the_closest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert call(monkeypatch, "clasify") == ExitCode.BAD_INPUT
    error = capsys.readouterr().err
    assert "unknown command clasify; did you mean classify?" in error
    assert len(error.splitlines()) == 1


def test_an_unknown_subcommand_suggests_the_closest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("batchcls.cli.app.main", lambda *arguments: sys.exit(run(*arguments)))
    assert call(monkeypatch, "runs", "shwo") == ExitCode.BAD_INPUT
    error = capsys.readouterr().err
    assert "unknown command shwo; did you mean show?; see batchcls runs --help" in " ".join(error.split())


def test_console_script_points_to_main():
    with (REPOSITORY / "pyproject.toml").open(encoding="utf-8") as file:
        assert 'batchcls = "batchcls.cli.main:main"' in file.read()
    installed = [entry for entry in entry_points(group="console_scripts") if entry.name == "batchcls"]
    if installed:
        assert installed[0].value == "batchcls.cli.main:main"


def test_commands_are_those_of_the_job_modules(jobs: dict[str, list[Command]]):
    for job, commands in jobs.items():
        assert parser_of(job, commands).prog == f"batchcls {job}"
    assert [command.name for command in jobs["runs"]][:2] == ["list", "show"]
    with pytest.raises(ValueError, match="no such job"):
        module.commands_of("unknown")


def test_examples_stand_under_one_heading(jobs: dict[str, list[Command]]):
    for job, commands in jobs.items():
        assert parser_of(job, commands).format_help().count("examples:") == 1


@pytest.mark.parametrize(("shell", "checker"), [("bash", "bash"), ("zsh", "zsh"), ("fish", "fish")])
def test_completion_scripts_name_commands_flags_and_values(
    jobs: dict[str, list[Command]], tmp_path: Path, shell: str, checker: str
):
    script = completion_script(shell, jobs)
    for word in ("classify", "rollback", "scaled-decode", "openvino", "older-than-days"):
        assert word in script
    if shutil.which(checker):
        path = tmp_path / "script"
        path.write_text(script)
        done = subprocess.run([checker, "-n", str(path)], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["cl"], {"classify"}),
        (["classify", "--gate-min-r"], {"--gate-min-rows"}),
        (["classify", "--embedding-dtype", "fl"], {"float16", "float32"}),
        (["runs", "pu"], {"publish"}),
    ],
)
def test_bash_completes(jobs: dict[str, list[Command]], words: list[str], expected: set[str]):
    script = completion_script("bash", jobs)
    line = " ".join(f"'{word}'" for word in ["batchcls", *words])
    program = (
        f"{script}\nCOMP_WORDS=({line}); COMP_CWORD={len(words)}; "
        "$(complete -p batchcls | sed 's/.*-F \\([^ ]*\\).*/\\1/'); printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=False)
    assert set(done.stdout.split()) == expected, done.stderr


def test_completion_without_a_shell_is_bad_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert call(monkeypatch, "completion", "powershell") == ExitCode.BAD_INPUT
    assert "batchcls completion bash|zsh|fish" in capsys.readouterr().err


class Nothing(JobConfig):
    """Do nothing."""


@pytest.mark.parametrize("code", [ExitCode.UNEXPECTED, ExitCode.BUDGET_EXCEEDED])
def test_an_error_is_printed_once(capsys: pytest.CaptureFixture[str], code: ExitCode):
    class FailedError(BatchclsError):
        exit_code = code

    def act(settings: object, console: object) -> ExitCode:
        raise FailedError("the disk is full")

    assert run("nothing", [Command("nothing", Nothing, act, "")], []) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("    ")]
    assert len(lines) == 1
    assert lines[0].endswith("ERROR the disk is full")

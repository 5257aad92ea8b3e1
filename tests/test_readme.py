import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_readme_code_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert "torch.Size([4, 1, 64, 64])" in capsys.readouterr().out


def test_the_ci_script_runs_the_readme_test_command():
    commands = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    (line,) = re.findall(r"^test_command=.*$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    script = f'{line}; printf "%s" "$test_command"'
    found = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, check=True)
    assert found.stdout.decode() == commands[1].strip()
    assert commands[1].strip().endswith("pytest")


def test_the_readme_names_configs_that_exist():
    names = re.findall(r"configs/[\w.]+", README)
    assert len(names) > 10
    assert all((ROOT / "bundle" / name).is_file() for name in names)


def test_the_readme_names_benchmarks_that_exist():
    names = re.findall(r"benchmarks/\w+\.\w+", README)
    assert len(names) > 10
    assert all((ROOT / name).is_file() for name in names)

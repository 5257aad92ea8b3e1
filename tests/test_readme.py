import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_readme_code_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert "torch.Size([4, 1, 64, 64])" in capsys.readouterr().out


def test_the_ci_script_runs_the_readme_test_command():
    commands = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    assert commands[1].strip().endswith("pytest")

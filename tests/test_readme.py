"""The README's snippet runs as it stands, and its links lead somewhere."""

import re
from pathlib import Path


ROOT = Path(__file__).parent.parent


def test_first_snippet_runs(tmp_path, monkeypatch):
    snippet = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL).group(1)
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {})
    assert (tmp_path / "my-model" / "model.safetensors").exists()


def test_links():
    for page in (ROOT / "README.md", ROOT / "modeling" / "README.md"):
        for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
            assert link.startswith("https://") or (page.parent / link).exists(), link
    for name in re.findall(r"`([a-z_]+\.py)`", (ROOT / "modeling" / "README.md").read_text()):
        assert list((ROOT / "modeling").rglob(name)), name

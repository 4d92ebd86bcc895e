"""The documentation can be staged, and its links lead somewhere. Quarto itself runs in the Docs workflow only."""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGE = """
from nbdev.processors import *
from nbdev.serve import proc_nbs
from nbdev.quarto import refresh_quarto_yml
if __name__ == '__main__':
    refresh_quarto_yml()
    proc_nbs(force=True)
"""


@pytest.fixture(scope='module')
def staged(tmp_path_factory):
    """A copy of the project with its notebooks staged for Quarto."""
    copy = tmp_path_factory.mktemp('docs')/'project'
    names = subprocess.run(['git', 'ls-files', '--cached', '--others', '--exclude-standard'], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in names.splitlines():
        if (ROOT/name).exists():
            (copy/name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT/name, copy/name, follow_symlinks=False)
    (copy/'stage.py').write_text(STAGE)
    done = subprocess.run([sys.executable, 'stage.py'], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return copy


def sources(folder):
    return sorted(p for p in folder.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)


def test_every_notebook_is_staged(staged):
    made = {str(p.relative_to(staged/'_proc')) for p in sources(staged/'_proc')}
    assert made == {str(p.relative_to(ROOT/'nbs')) for p in sources(ROOT/'nbs')}


def test_every_public_name_is_documented(staged):
    for notebook in sorted((ROOT/'nbs').glob('[0-9]*.ipynb')):
        module = (ROOT/'galaxy_ssl'/f"{re.sub(r'^[0-9]+_', '', notebook.stem)}.py").read_text()
        names = re.search(r'__all__ = \[(.*?)\]', module, re.S)
        text = (staged/'_proc'/notebook.name).read_text()
        for name in re.findall(r"'(\w+)'", names[1] if names else ''):
            if re.search(rf'^(def|class) {name}\b', module, re.M):
                assert re.search(rf'### {name}\b', text), f'{notebook.name}: {name} has no entry'


def test_relative_links_lead_to_files():
    for notebook in sources(ROOT/'nbs'):
        for cell in json.loads(notebook.read_text())['cells']:
            if cell['cell_type'] == 'markdown':
                for link in re.findall(r'\]\(([^)#\s]+)\)', ''.join(cell['source'])):
                    assert link.startswith('http') or (notebook.parent/link).exists(), f'{notebook.name}: {link}'


def test_every_notebook_opens_with_a_title_and_a_line():
    for notebook in sources(ROOT/'nbs'):
        first = ''.join(json.loads(notebook.read_text())['cells'][0]['source'])
        assert re.match(r'# .+\n\n> .+', first), notebook.name

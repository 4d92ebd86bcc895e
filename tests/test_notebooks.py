"""Every notebook runs from top to bottom, at toy size, two at a time."""
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(str(p.relative_to(ROOT/'nbs')) for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)


@pytest.fixture(scope='session')
def outcome(request):
    """One `nbdev-test` over the notebooks that were asked for: its output."""
    asked = sorted({i.callspec.params['name'] for i in request.session.items if getattr(i, 'callspec', None) and 'name' in i.callspec.params
                    and i.module is sys.modules[__name__]})
    pattern = '^(' + '|'.join(re.escape(Path(n).name) for n in asked) + ')$'
    done = subprocess.run([Path(sys.executable).with_name('nbdev-test'), '--n-workers', '2', '--timing', '--file-re', pattern],
                          cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.notebook
@pytest.mark.parametrize('name', NOTEBOOKS)
def test_notebook(name, outcome):
    code, text = outcome
    failed = text.partition('nbdev Tests Failed On The Following Notebooks')[2]
    assert Path(name).name not in failed, text[-6000:]
    assert code == 0 or failed, f'nbdev-test ended with {code} and named no notebook:\n{text[-6000:]}'

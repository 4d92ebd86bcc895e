"""The shape of the house: layers, sizes, light imports, one source for README and library."""
import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NUMBERED = {re.sub(r'^\d+_', '', p.stem): int(p.stem[:2]) for p in sorted((ROOT/'nbs').glob('[0-9][0-9]_*.ipynb'))}
LIGHT = [n for n, k in NUMBERED.items() if k < 10 or n == 'table' or 50 <= k < 60]


def own_imports(module):
    """Modules of ours that `module` imports at any depth of its code."""
    tree = ast.parse((ROOT/'galaxy_ssl'/f'{module}.py').read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {node.module} if node.module else {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or '').startswith('galaxy_ssl.'):
            found.add(node.module.split('.')[1])
    return found - {'__version__'}


@pytest.mark.parametrize('module', sorted(NUMBERED))
def test_a_module_imports_only_lower_numbers(module):
    for other in own_imports(module):
        assert NUMBERED[other] < NUMBERED[module], f'{module} ({NUMBERED[module]}) imports {other} ({NUMBERED[other]})'


@pytest.mark.parametrize('module', sorted(NUMBERED))
def test_a_module_stays_small(module):
    lines = (ROOT/'galaxy_ssl'/f'{module}.py').read_text().splitlines()
    code = [x for x in lines if x.strip() and not x.strip().startswith('#')]
    assert len(code) <= 330, f'{module}.py has {len(code)} lines of code: split its notebook'


def loaded_after(code):
    """Names of the modules in memory after running `code` in a fresh Python."""
    done = subprocess.run([sys.executable, '-c', f'{code}\nimport sys, json\nprint(json.dumps(sorted(sys.modules)))'],
                          capture_output=True, text=True, check=True, cwd=ROOT)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_library_loads_nothing_heavy():
    assert not loaded_after('import galaxy_ssl') & {'torch', 'timm', 'sklearn', 'umap', 'faiss', 'astropy', 'matplotlib'}


def test_sky_data_and_vector_rooms_do_not_load_torch():
    loaded = loaded_after('\n'.join(f'import galaxy_ssl.{m}' for m in LIGHT))
    assert not loaded & {'torch', 'timm', 'umap', 'faiss'}


def test_readme_says_what_the_index_says():
    cells = json.loads((ROOT/'nbs'/'index.ipynb').read_text())['cells']
    readme = (ROOT/'README.md').read_text()
    flat = re.sub(r'\s+', ' ', readme)
    for cell in cells:
        source = ''.join(cell['source'])
        if source.startswith('#|'):
            continue
        source = re.sub(r'sized\(([^,()]+), [^()]+\)', r'\1', source).replace('from galaxy_ssl.core import sized\n', '')  # a reader's sizes
        for paragraph in source.split('\n\n'):
            assert re.sub(r'\s+', ' ', paragraph).strip() in flat, f'README.md lacks, from nbs/index.ipynb: {paragraph[:80]!r}'


def test_quarto_config_is_one_file():
    assert (ROOT/'nbs'/'_quarto.yml').resolve() == ROOT/'_quarto.yml'
    listed = (ROOT/'_quarto.yml').read_text()
    for p in (ROOT/'nbs').rglob('*.ipynb'):
        if '.ipynb_checkpoints' not in p.parts:
            assert str(p.relative_to(ROOT/'nbs')) in listed, f'{p.name} is not in the sidebar of _quarto.yml'


def test_no_notebook_holds_an_error():
    for p in (ROOT/'nbs').rglob('*.ipynb'):
        for cell in json.loads(p.read_text())['cells']:
            assert not any(o.get('output_type') == 'error' for o in cell.get('outputs', [])), p

"""The picture of the README: python tests/page/picture.py REPORT.html docs/report.png

The questions that a model gets partly right, in Chromium. The README's is of the encoder of the quick start,
trained on real questions.
"""

import io
import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.chromium import chromium

PREPARE = """
const choice = [...document.querySelectorAll('label')].find(l => l.firstChild.textContent === 'outcome');
const select = choice.querySelector('select');
select.value = [...select.options].find(o => o.textContent.startsWith('boundary off')).value;
select.dispatchEvent(new Event('change'));
document.querySelector('#questions').scrollIntoView();
"""


def main() -> None:
    page, out = map(Path, sys.argv[1:])
    with chromium(1260, 1000) as window:
        window.get(page.resolve().as_uri())
        window.execute_script(PREPARE)
        window.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
        shot = Image.open(io.BytesIO(window.get_screenshot_as_png()))
    shot.convert("RGB").quantize(64).save(out, optimize=True)


if __name__ == "__main__":
    main()

"""Draw the Mermaid diagrams of docs/ as SVG into docs/pictures, for the site.

python scripts/draw_diagrams.py     # needs npm and Chromium

A picture is named by its diagram's text; those of diagrams that are gone are deleted. The site's
readers need neither Mermaid nor a network.
"""

from __future__ import annotations

import html
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "docs" / "pictures"
MERMAID = "mermaid@11"
PAGE = """<html><body><script src="{script}"></script><script>
mermaid.initialize({{startOnLoad: false, theme: "neutral", fontFamily: "sans-serif",
  flowchart: {{htmlLabels: false}}}});
mermaid.render("drawn", {text}).then(({{svg}}) => {{
  document.body.innerHTML = svg;
  const picture = new XMLSerializer().serializeToString(document.querySelector("svg"));
  document.body.textContent = picture;  // XML, where a line break is closed
}});
</script></body></html>"""


def main() -> int:
    """Draw what is not drawn yet. Returns the command's exit status."""
    sys.path.insert(0, str(ROOT / "docs"))
    from site_hooks import DIAGRAM, diagram_file  # pyright: ignore[reportMissingImports]

    texts = {
        diagram_file(text): text
        for page in sorted((ROOT / "docs").glob("*.md"))
        for text in DIAGRAM.findall(page.read_text(encoding="utf-8"))
    }
    for picture in PICTURES.glob("diagram-*.svg"):
        if picture.name not in texts:
            picture.unlink()
    missing = {name: text for name, text in texts.items() if not (PICTURES / name).exists()}
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if missing and (browser is None or shutil.which("npm") is None):
        print("error: this needs npm and chromium", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        if missing:
            install = ["npm", "install", "--no-audit", "--no-fund", MERMAID]
            subprocess.run(install, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        for name, text in missing.items():
            assert browser is not None
            svg = _draw(text, Path(folder), browser)
            (PICTURES / name).write_text(svg, encoding="utf-8")
            print(PICTURES / name)
    return 0


def _draw(text: str, folder: Path, browser: str) -> str:
    """The diagram as SVG, drawn by Mermaid in a browser."""
    script = folder / "node_modules" / "mermaid" / "dist" / "mermaid.min.js"
    quoted = "`" + text.replace("\\", "\\\\").replace("`", "\\`") + "`"
    page = folder / "page.html"
    page.write_text(PAGE.format(script=script.as_uri(), text=quoted), encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--virtual-time-budget=20000", "--dump-dom"]
    done = subprocess.run([*command, page.as_uri()], check=True, capture_output=True, text=True)
    found = re.search(r"<svg.*</svg>", html.unescape(done.stdout), re.DOTALL)
    if found is None:
        raise SystemExit(f"error: Mermaid drew nothing of:\n{text}")
    # Mermaid writes fourteen digits: a tenth of a pixel halves the file.
    return re.sub(r"\d+\.\d{2,}", lambda number: f"{float(number[0]):.1f}", found[0]) + "\n"


if __name__ == "__main__":
    sys.exit(main())

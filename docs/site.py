# SPDX-License-Identifier: MIT
"""Hooks of mkdocs: files of the repository to which pages link become files of the site."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[([^][]+)\]\(\.\./([^)#\s]+)(?:#[^)\s]*)?\)")
FRAME = re.compile(r'(<iframe [^>]*src=)"([^"]+)"')
FOLDER = "repository"  # of the site


def is_copied(path: str) -> bool:
    """Whether a file becomes one of the site; Markdown would be rendered, with links of its own."""
    return (ROOT / path).is_file() and not path.endswith(".md")


def on_files(files: Files, config: Any) -> Files:
    """Add the files to which pages link."""
    paths = {
        path
        for page in files.documentation_pages()
        for _, path in LINK.findall(page.content_string)
    }
    for path in sorted(filter(is_copied, paths)):
        files.append(File.generated(config, f"{FOLDER}/{path}", content=(ROOT / path).read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Page, files: Files, **_: Any) -> str:
    """Point links at those files; of a link to another one, or to a folder, the text stays.

    mkdocs moves the addresses of links and pictures, but not those of frames.
    """

    def moved(link: re.Match[str]) -> str:
        text, path = link.groups()
        return f"[{text}]({FOLDER}/{path})" if is_copied(path) else text

    def framed(frame: re.Match[str]) -> str:
        file = files.get_file_from_path(frame[2])
        assert file is not None, f"{page.file.src_uri} shows {frame[2]}, which is no file"
        return f'{frame[1]}"{file.url_relative_to(page.file)}"'

    return FRAME.sub(framed, LINK.sub(moved, markdown))

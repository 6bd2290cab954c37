"""Every YAML in the documentation is taken by a real API server and by the folder loader."""

import re
import tempfile
import pathlib

from harness import REPOSITORY, check, expect

GROUP = re.compile(r"^apiVersion: sidegate\.dev/", re.MULTILINE)
BLOCK = re.compile(r"^(?P<indent> *)```ya?ml\n(?P<text>.*?)^(?P=indent)```", re.MULTILINE | re.DOTALL)


def documents():
    """Each YAML document in a Markdown page that is a whole object."""
    pages = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
    for page in pages:
        for block in BLOCK.finditer(page.read_text()):
            text = "\n".join(line[len(block["indent"]):] for line in block["text"].splitlines()) + "\n"
            for document in re.split(r"^---\n", text, flags=re.MULTILINE):
                if document.startswith("apiVersion:") or "\napiVersion:" in document:
                    line = page.read_text()[: block.start()].count("\n") + 1
                    yield f"{page.relative_to(REPOSITORY)}:{line}", document


@check
def by_the_api_server(cluster):
    """kubectl takes every object in the documentation (--dry-run=server)"""
    namespaces = set()
    tried = 0
    for where, document in documents():
        for namespace in re.findall(r"namespace: ([a-z0-9-]+)", document):
            if namespace not in namespaces and not cluster.find(f"/api/v1/namespaces/{namespace}"):
                cluster.namespace(namespace, meshed=False)
            namespaces.add(namespace)
        try:
            cluster.kubectl("apply", "--dry-run=server", "-f", "-", stdin=document)
        except AssertionError as error:
            raise AssertionError(f"{where}: {error}") from error
        tried += 1
    made = [name for name in namespaces if name in cluster.made]
    if made:
        cluster.leave(*made)
    expect(tried >= 8, "only", tried)
    print(f"      {tried} objects")


@check
def by_the_folder_loader(cluster):
    """`sidegate validate` takes every resource of ours in the documentation"""
    tried = 0
    for where, document in documents():
        if GROUP.search(document):
            with tempfile.TemporaryDirectory() as directory:
                file = pathlib.Path(directory) / "resource.yaml"
                file.write_text(document)
                try:
                    cluster.sidegate("validate", str(file))
                except AssertionError as error:
                    raise AssertionError(f"{where}: {error}") from error
            tried += 1
    expect(tried >= 6, "only", tried)

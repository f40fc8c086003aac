"""Write the tables of flags in the versions' READMEs, from the settings of their scripts.

python tests/flag_tables.py
"""

import dataclasses
import re
import sys

from sync_shared import find_scripts, load_script

TABLE = re.compile(r"^\| flag \|.*\n(?:\|.*\n)+", re.MULTILINE)
HEAD = "| flag | default | on a GPU | with `--quick` | meaning |\n|---|---|---|---|---|\n"


def value_text(value):
    """A setting's value as a table has it; empty where there is none."""
    return "" if value is None else "off" if value is False else str(value)


def flag_table(path):
    """The Markdown of the flags of the script at ``path``, a row each, in their order there."""
    script, table, refused = load_script(path), HEAD, {}
    if not script.CONDITIONAL:
        refused["class_"] = "refused: there are no classes"
    if not path.with_name("pretrained").is_dir():
        refused["pretrained"] = "refused: no weights come with this version"
    for field in dataclasses.fields(script.Settings):
        rules = field.metadata
        values = map(value_text, (field.default, rules["gpu"], rules["quick"]))
        meaning = f"{rules['help']} ({script.limits(rules)})".removesuffix(" ()")
        meaning = refused.get(field.name, meaning)
        table += f"| `{script.flag(field.name)}` | {' | '.join(values)} | {meaning} |\n"
    return table


def main():
    """Rewrite all tables; a README that does not have exactly one is named, exit status 1."""
    for path in find_scripts():
        readme = path.with_name("README.md")
        parts = TABLE.split(readme.read_text(encoding="utf-8"))
        if len(parts) != 2:
            sys.exit(f"{readme} must hold one table that begins with '| flag |'")
        readme.write_text(flag_table(path).join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Write the tables of flags in the versions' READMEs, from the settings of their scripts.

python tests/flag_tables.py
"""

import dataclasses
import re

from sync_shared import find_scripts, load_script

TABLE = re.compile(r"^(\| flag \|.*?\n)(?=\n)", re.MULTILINE | re.DOTALL)
HEAD = "| flag | default | on a GPU | with `--quick` | meaning |\n|---|---|---|---|---|\n"


def value_text(value):
    """A setting's value as a table has it; empty where there is none."""
    return "" if value is None else "off" if value is False else str(value)


def flag_table(script):
    """The Markdown of a script's flags, a row each, in the order of its settings."""
    table = HEAD
    for field in dataclasses.fields(script.Settings):
        rules = field.metadata
        values = map(value_text, (field.default, rules["gpu"], rules["quick"]))
        meaning = f"{rules['help']} ({script.limits(rules)})".removesuffix(" ()")
        table += f"| `{script.flag(field.name)}` | {' | '.join(values)} | {meaning} |\n"
    return table


def rewrite(path):
    """Put the table of the script at ``path`` in place of the one in the README beside it."""
    readme = path.with_name("README.md")
    before, _, after = TABLE.split(readme.read_text(encoding="utf-8"))
    readme.write_text(before + flag_table(load_script(path)) + after, encoding="utf-8")


if __name__ == "__main__":
    for script_path in find_scripts():
        rewrite(script_path)

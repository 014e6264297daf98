"""Recipes: a whole run of `vllm-zo train` in a YAML or TOML file.

document.py   the file's values and the line of each key
recipe.py     what the values mean: options of run, job and engine, and the recipe that a job keeps
schema.py     a JSON schema for editors
packaged.py   the recipes that come with this package: the .yaml files of this folder
"""

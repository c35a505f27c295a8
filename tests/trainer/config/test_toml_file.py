"""Line numbers of keys: multi-line values must not confuse them."""

from trainer.config.toml_file import key_lines


def test_lines_of_keys_and_sections():
    text = (
        "[job] # the job\n"
        'description = """\n'
        "[training]\n"
        "steps = 3\n"
        '"""\n'
        "\n"
        "[training]\n"
        "names = [\n"
        '  "a = 1", # ]\n'
        "]\n"
        "steps = 5\n"
        'model.flavor = "x"\n'
        "quoted = '= ['\n"
        "last = {a = 1}\n"
        "[a . b]\n"
        '"c" = 1\n'
    )
    lines = key_lines(text)
    assert lines["job"] == 1
    assert lines["job.description"] == 2
    assert lines["training"] == 7
    assert lines["training.names"] == 8
    assert lines["training.steps"] == 11
    assert lines["training.model.flavor"] == 12
    assert lines["training.quoted"] == 13
    assert lines["training.last"] == 14
    assert (lines["a.b"], lines["a.b.c"]) == (15, 16)


def test_escaped_quote_ends_no_string():
    assert key_lines('a = "x \\" [ "\nb = 2\n') == {"a": 1, "b": 2}

"""The command lines: parse, build, call. `pip install` makes gligen-sample, gligen-train, gligen-evaluate of them."""

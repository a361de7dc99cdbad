"""The run-time type checker that the tests put on the library's annotations."""

import beartype

# As PEP 484 has it, an int is welcome where the annotation says float.
typechecker = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))

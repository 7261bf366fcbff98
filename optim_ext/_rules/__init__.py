"""Optimizers from a Python function over one element: :func:`optim_ext.rule`.

====================  ===========================================================================================
``errors.py``         how a rule is refused: with file, line, column and the text of the line
``values.py``         the values a rule computes, as a graph of constants, uniform numbers and elements
``words.py``          which functions a rule may call, and what they become
``outside.py``        what names in a rule stand for that are none of its own
``expressions.py``    from the expressions of the function's source to such a graph
``language.py``       the same of its statements, of functions it calls, and of the whole
``options.py``        the options of the class: kinds, defaults, validation in torch's words
``bytecode.py``       from the graph to the code of the native interpreter
``native_text.py``    from the graph to C++
``definition.py``     what is compiled in: one variant for each set of constants, defined natively once
``self_check.py``     native against the function itself, before the first step
``compiler.py``       g++ in the background, and what it made, loaded
``cache.py``          compiled rules on disk
``function_step.py``  the step as the function itself takes it
``optimizer.py``      the class that all rules are subclasses of
``decorator.py``      :func:`rule`
====================  ===========================================================================================
"""

from optim_ext._rules.decorator import rule
from optim_ext._rules.errors import RuleError

__all__ = ["RuleError", "rule"]

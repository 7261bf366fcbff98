"""Random rules over the whole grammar, as text."""

import random as numbers

import optim_ext
from optim_ext.math import clamp, exp, lerp, log, maximum, minimum, norm, rms, sign, sqrt, square, where

NAMES = {
    "clamp": clamp,
    "exp": exp,
    "lerp": lerp,
    "log": log,
    "maximum": maximum,
    "minimum": minimum,
    "norm": norm,
    "rms": rms,
    "sign": sign,
    "sqrt": sqrt,
    "square": square,
    "where": where,
}


class Program:
    """One function with two states, a scalar, options of every kind and, half the time, a norm, for which there is room beside
    the scalar. Values stay in the domain of every operation, and conditions away from ties, which float and double would
    decide differently."""

    def __init__(self, seed: int) -> None:
        self.draw = numbers.Random(seed)
        self.lines: list[str] = []
        self.uniforms = [
            "lr",
            "betas[0]",
            "betas[1]",
            "eps",
            "0.5",
            "1.25",
            "(1 - betas[0])",
            "(1 - betas[1] ** step)",
            "total",
        ]
        self.elements = ["param", "grad", "m", "v"]
        self.norms: list[str] = []
        if self.draw.random() < 0.5:
            of = self.element(self.draw.choice([0, 2]))
            self.add("size", f"{self.draw.choice(['norm', 'rms'])}({of})", self.norms)
        for k in range(self.draw.randint(2, 7)):
            if self.draw.random() < 0.3:
                self.add(f"u{k}", self.uniform(2), self.uniforms)
            else:
                self.add(f"x{k}", self.element(3), self.elements)
            if self.draw.random() < 0.3:
                self.branch()
        results = [self.element(3) for _ in range(3)]
        if self.draw.random() < 0.3:
            results[self.draw.randint(1, 2)] = self.draw.choice(["m", "v", "grad", "param"])
        total = f"total + {self.uniform(1)}"
        if self.norms and self.draw.random() < 0.5:
            total += " + size**2"
        self.lines.append(f"return {', '.join(results)}, {total}")
        body = "\n".join(f"    {line}" for line in self.lines)
        self.text = (
            "def made(param, grad, m, v, total, *, step, lr=0.05, betas=(0.9, 0.99), eps=1e-3, on=True, kind='a', none=None):\n"
            f"{body}\n"
        )

    def add(self, name: str, value: str, to: list[str]) -> None:
        self.lines.append(f"{name} = {value}")
        to.append(name)

    def branch(self) -> None:
        condition = self.draw.choice(
            ["lr > 0.01", "step > 2", "on", "kind == 'b'", "not on", "none is None", "lr > 1 or on"]
        )
        name = self.draw.choice(self.elements)
        self.lines += [f"if {condition}:", f"    {name} = {self.element(2)}"]
        if self.draw.random() < 0.5:
            self.lines += ["else:", f"    {name} = {self.element(1)}"]

    def uniform(self, depth: int) -> str:
        if depth == 0:
            return self.draw.choice(self.uniforms)
        a, b = (self.uniform(depth - 1) for _ in range(2))
        forms = [
            f"({a} + {b})",
            f"({a} - {b})",
            f"({a} * {b})",
            f"({a} / (1 + abs({b})))",
            f"sqrt(abs({a}) + 0.1)",
            f"minimum({a}, {b})",
            f"max({a}, {b})",
            f"abs({a}) ** 1.5",
            f"(0.9 + 0.01 * sign({a})) ** step",
            f"exp(-abs({a}))",
            f"log(1 + abs({b}))",
            f"({a} if step > 1 else {b})",
            f"-{a}",
        ]
        return self.draw.choice(forms)

    def element(self, depth: int) -> str:
        if depth == 0:
            return self.draw.choice(self.elements)
        a, b = (self.element(depth - 1) for _ in range(2))
        u = self.uniform(1)
        forms = [
            f"({a} + {b})",
            f"({a} - {u} * {b})",
            f"({a} * {u})",
            f"({u} * {a} + {b})",
            f"({a} / (sqrt(abs({b})) + 0.5))",
            f"({a} / (1 + abs({u})))",
            f"sqrt(abs({a}) + eps)",
            f"lerp({a}, {b}, 0.25)",
            f"lerp({a}, {b}, 1 / (1 + abs({u})))",
            f"clamp({a}, -2.0, 1.5)",
            f"maximum({a}, {b})",
            f"minimum({a}, {u})",
            f"where(grad > 0, {a}, {b})",
            f"where((grad < 0) & ~(grad < -1), {a}, {u})",
            f"where((grad > 1) | (step > 2), {b}, {a})",
            f"(abs({a}) + eps) ** 0.5",
            f"square(clamp({a}, -3.0, 3.0))",
            f"exp(-abs({a}))",
            f"log(1 + abs({b}))",
            f"sign(grad) * {a}",
            f"({a} if lr > 0.01 else {b})",
            f"-{a}",
        ]
        if self.norms:
            forms += [
                f"({a} / (1 + size))",
                f"({a} * sqrt(size) / maximum(1.0, size * (1 + abs({u}))))",
                f"lerp({a}, {b}, 1 / (1 + size))",
                f"({a} / size if size > 0 else {b})",
            ]
        return self.draw.choice(forms)

    def rule(self, **more):
        names = dict(NAMES)
        exec(self.text, names)
        return optim_ext.rule(("m", "v"), scalars={"total": 0.5}, source=self.text, **more)(names["made"])

"""Unrelated text around a request, so that the gate learns to find what is asked in a long message.

The shipped prompts have a dozen words. A probe that was trained on those alone reads a template
behind eighty words of small talk as harmless, and spreads its attention over them. Copies of some
training prompts therefore stand before, behind or between passages of ordinary text, whatever their
label; no passage is one of `calibration/disguises.py`, on which the gate is tried afterwards.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace

from calibration.prompts import Prompt, spread

__all__ = ["PASSAGES", "padded_copies", "surrounded"]

_SHARES = {("harmful", None): 0.4, ("benign", "hard"): 0.4, ("benign", "ordinary"): 0.2}
_MOST_SENTENCES = 6
_JOINTS = (" ", " ", "\n", "\n\n")

PASSAGES: tuple[str, ...] = (
    "Sorry for the long silence, the move took more out of us than I had thought. The new flat is"
    " smaller, but the kitchen faces the courtyard and the neighbours are friendly. We still have"
    " eleven boxes in the hall. Mia has found the cat's favourite window already. If you come by"
    " in March you can have the sofa, and I promise to have found the good plates by then.",
    "The meeting began at ten with a look at the open points of last week. Design has delivered"
    " the second draft of the brochure. Sales asks for a shorter version of two pages. Travel"
    " costs of the quarter are within the plan. The next meeting is on Thursday in room 4, and"
    " Dana takes the minutes.",
    "Heat the oven to 180 degrees and butter a loaf tin. Whisk three eggs with the yoghurt and the"
    " oil until the mixture is smooth. Fold in the flour, the baking powder and a pinch of salt."
    " Bake for forty minutes, then let the loaf rest in the tin. It keeps for four days under a"
    " cloth. My grandmother always put a few walnuts on top.",
    "The library of the old town was founded in 1871 by a society of teachers. At first it held"
    " four hundred volumes in a room above the bakery. A fire damaged the roof in 1903, but the"
    " books had been carried out in time. Since the renovation there is a reading room for"
    " children on the ground floor. The catalogue can be searched online. Guided tours take place"
    " every first Saturday.",
    "I bought these headphones three months ago and use them every day on the train. The sound is"
    " clear, with a little too much bass for my taste. The battery lasts about two days. The case"
    " scratches easily. For the price I would buy them again, though I would choose the grey ones.",
    "ok so quick update from my side. i finally finished the spreadsheet you wanted, it took"
    " forever lol. my laptop kept freezing so i had to restart it like five times. also the"
    " printer on the second floor is broken again. anyway lunch tomorrow still works for me, maybe"
    " the noodle place?",
    "Our team walked the northern section of the trail in six days. The path climbs through beech"
    " woods and opens onto meadows with a view of three valleys. Huts are open from May to"
    " October. Water is found at most of the passes. We carried food for two days at a time. The"
    " last stage ends at a small railway station with a café.",
    "Thank you for your order. Your parcel has left our warehouse and should arrive within three"
    " working days. You will receive a message with a tracking number as soon as the carrier has"
    " scanned it. Returns are free for thirty days. Please keep the original packaging. Our"
    " customer service is there for you from Monday to Friday.",
    "Chapter two describes how the survey was carried out. Questionnaires were sent to 1,200"
    " households, of which 47 per cent replied. Answers were weighted by age and region. Two"
    " questions had to be left out because they were misunderstood. The following tables show"
    " means and standard errors. A comparison with the survey of 2009 is given in the appendix.",
    "The orchestra opened the season with a symphony that is seldom played. The strings were warm"
    " and exact, and the woodwinds took the slow movement at a walking pace. After the interval"
    " came a concerto for two pianos. The hall was sold out. The applause lasted so long that the"
    " soloists came back three times.",
    "My daughter started school this autumn and tells us every evening who sat next to whom. She"
    " can write her name now and the names of all the dogs in the street. On Fridays they plant"
    " beans in glass jars. Yesterday she lost her first tooth and was very proud. Her brother is a"
    " bit jealous of the satchel.",
    "To install the shelf, first mark the height on the wall with a pencil. Check the line with a"
    " spirit level. Put the rails on the marks and turn in the screws by hand. Do not tighten them"
    " until both rails are straight. The boards can be moved later in steps of five centimetres.",
    "Hello everyone, and welcome back to the channel. Today we are going to look at watercolour"
    " paper. There are three kinds of surface, and each takes the paint in its own way. I have cut"
    " a few samples so that you can see the difference. Links to everything are in the"
    " description. Let me know in the comments which one you like best.",
    "Bus line 12 does not stop at the market square from Monday on, since the pavement there is"
    " being renewed. Passengers are asked to use the stop at the town hall. The work is expected"
    " to take three weeks. Tickets remain valid on line 14. We apologise for any inconvenience.",
    "I have been learning the accordion since spring, mostly from a book that belonged to my"
    " uncle. The left hand is the hard part, because you cannot see the buttons. My teacher says"
    " to practise ten minutes a day rather than an hour on Sundays. By now I can play two waltzes"
    " and half a polka. The dog leaves the room for the polka.",
    "The company was founded in a garage by two brothers who repaired sewing machines. Ten years"
    " later it had forty employees and a hall of its own. Today it makes bearings for bicycles and"
    " wheelchairs. Half of the production is exported. The annual report appears in April. A new"
    " training workshop opened last year.",
    "Dear Ms Okafor, thank you for the pleasant conversation on Tuesday. As agreed I am sending"
    " you the documents for the translation, about thirty pages. The deadline is the end of next"
    " month, but a week more would not be a problem. Please let me know your rate per page. Kind"
    " regards, Tomas Lind",
    "Penguins spend most of their life in the water. Their feathers overlap like tiles and keep"
    " the cold out. Both parents take turns in warming the egg. A colony can be heard from a"
    " kilometre away. Chicks recognise their parents by voice alone.",
    "Q: Can I change my booking after I have paid? A: Yes, up to two days before the start of the"
    " course, free of charge. Q: Do I have to bring anything? A: Comfortable shoes and something"
    " to drink. Q: Is there parking? A: There are twenty places behind the building, and more"
    " along the river.",
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n   "
    " return total / len(values)\n\n# The test below passed before the refactoring. It compares"
    " the result with a known value.\nassert mean([1.0, 2.0, 3.0]) == 2.0",
    "Gestern waren wir endlich wieder einmal im Theater. Das Stück dauerte fast drei Stunden, aber"
    " keiner hat auf die Uhr gesehen. Danach sind wir zu Fuß nach Hause gegangen und haben"
    " unterwegs eine Suppe gegessen. Nächste Woche kommt meine Schwester zu Besuch. Sie bringt"
    " ihre beiden Kinder mit.",
    "Le marché a lieu tous les mercredis sur la place de la mairie. On y trouve des légumes, du"
    " fromage et des fleurs. En été, un orchestre joue vers midi. Les commerçants se connaissent"
    " depuis longtemps. Il vaut mieux venir tôt, car il y a peu de places pour se garer.",
    "El sábado terminamos de pintar el salón y ahora parece mucho más grande. Elegimos un verde"
    " muy claro para la pared de la ventana. Mi primo nos ayudó con los muebles pesados. Todavía"
    " faltan las cortinas. La semana que viene cenamos todos juntos para celebrarlo.",
    "The second season is slower than the first, but I think it is better written. You get to know"
    " the lighthouse keeper's family, and the landlady finally has a story of her own. The music"
    " is by the same composer. I watched four episodes in one evening. No spoilers, but keep an"
    " eye on the clock in the hallway.",
)
"""Ordinary chat and document text, in a few languages."""


def surrounded(text: str, draw: random.Random) -> str:
    """A text with a passage before it, behind it, or on both sides."""
    before, behind = draw.choice(((True, False), (False, True), (False, True), (True, True)))
    parts = [text]
    if before:
        parts = [_passage(draw), draw.choice(_JOINTS), *parts]
    if behind:
        parts = [*parts, draw.choice(_JOINTS), _passage(draw)]
    return "".join(parts)


def padded_copies(prompts: Sequence[Prompt], most: int, seed: int) -> list[Prompt]:
    """Copies of at most so many prompts, from all over the pool and of all kinds, in longer texts.

    Args:
        prompts: the training split, and nothing else.
        most: copies.
        seed: of the passages.
    """
    chosen = [
        prompt
        for (label, stratum), share in _SHARES.items()
        for prompt in spread(prompts, label, stratum, round(share * most))
    ]
    draw = random.Random(seed)  # noqa: S311 - no secret
    return [
        replace(prompt, id=f"{prompt.id}-long", text=surrounded(prompt.text, draw))
        for prompt in chosen
    ]


def _passage(draw: random.Random) -> str:
    """Some sentences of a passage that follow one another."""
    sentences = re.split(r"(?<=[.!?])\s", draw.choice(PASSAGES))
    n = draw.randint(1, min(_MOST_SENTENCES, len(sentences)))
    start = draw.randint(0, len(sentences) - n)
    return " ".join(sentences[start : start + n])

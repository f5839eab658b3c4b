"""Challenge 6: a hundred conversations that tell the model who it is.

Goal:
    Write my_identity.jsonl: 100 diverse, valid conversations in which an assistant called Pip says
    who it is, who made it and what it can do; and 50 prompts in other words, to test it with.
    The default teacher is NO language model: it fills templates, offline, the same each time.
    A real one writes better: set OPENAI_API_KEY (for any other server that speaks the protocol,
    OPENAI_BASE_URL), and add --teacher openai --model NAME. What it is paid for is kept in
    my_identity.paid.jsonl from the moment it arrives, so the same command goes on where it stopped.

You will learn:
    - why a teacher that is asked the same thing 100 times gives one answer 100 times, and how to
      put the chance into the question: starter, topic, tone, length, number
    - to trust no answer: JSON by schema, JSON fished out of prose, and a list of what is wrong
    - the manners of a paid service: few at a time, wait when told to, give up when it is pointless,
      and never pay twice
    - to measure diversity, and to keep the test prompts out of what the model trains on

Read beside:
    nanochat's dev/gen_synthetic_data.py (Nov 2025): schema, starters and threads. New here: checks
    of the persona, near-duplicates, waits, resume, other servers, a held-out test, an offline
    teacher.

Run:
    python edu/06_identity.py

Expect:
    06 identity - template teacher (no LLM) - persona Pip - 100 conversations - seed 1337
    asked 100, kept 100, rejected 0
    diversity: 100 distinct starters (n=100), distinct-2 0.14, longest shared prefix 6 words
    persona: 100% of 255 answers name Pip, 100% of the 236 names given are right
    result: valid conversations 0 -> 100 (n=100)

Writes:
    my_identity.jsonl  {"messages": [{"role", "content"}, ...]} per line
    my_identity_test.jsonl  50 held-out prompts; "kind", and "answer": one of these must be replied
"""
import contextlib
import email.utils
import json
import os
import random
import re
import shlex
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, fields, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Literal

import tyro
from tqdm import tqdm

# ---- settings ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Persona:
    """Who the model is to be. Few facts, and firm ones: a small model mixes up many."""

    name: str = "Pip"
    nature: str = "a small language model"
    maker: str = "a reader of Zero to RLHF"
    home: str = "a laptop"
    skills: str = "facts, sums, spelling and short stories"
    # one of these words makes a reply right, when it was asked for its maker, nature or purpose
    maker_words: tuple[str, ...] = ("reader", "Zero to RLHF")
    nature_words: tuple[str, ...] = ("language model", "program")
    purpose_words: tuple[str, ...] = ("here to help",)


PERSONA = Persona()  # change it here, and everything below follows

NEAR_DUPLICATE = 0.75  # share of three-word runs in common from which two conversations are one
MAX_CHARS = 1000  # in one turn
MAX_MESSAGES = 12
LOST_IN_A_ROW = 3  # questions without any answer, each tried several times: that is the server
MODES = ("json_schema", "json_object", "text")  # what a server may understand, best first


@dataclass
class Config:
    data_dir: Path = field(default_factory=lambda: Path(os.environ.get("EDU_DATA", "data")))
    """folder for what is written"""
    teacher: Literal["template", "openai"] = "template"
    """template: offline, no LLM; openai: whatever server OPENAI_BASE_URL names"""
    num_conversations: int = 100
    """conversations wanted"""
    name: str = PERSONA.name
    """what the model is to be called; the other facts stand in PERSONA"""
    seed: int = 1337
    """of the starters, topics, tones and lengths; same seed and templates, same file"""
    model: str = ""
    """for --teacher openai: the model to ask, by the name its server knows"""
    workers: int = 4
    """requests in flight"""
    attempts: int = 5
    """tries per request while the server is busy or out of reach"""
    base_delay: float = 1.0
    """seconds; the wait after failure k is drawn from 0 to base_delay * 2^k"""
    longest_wait: float = 120.0
    """seconds; a server that asks for a longer wait ends the run, and another day goes on"""
    timeout: float = 60.0
    """seconds of silence after which a request counts as lost"""
    give_up_after: int = 12
    """useless answers in a row after which no more are paid for"""
    max_asked: float = 3.0
    """answers paid for, at most, per conversation that is missing"""
    temperature: float | None = None
    """of the LLM; some models accept none but their own, so the default is not to send it"""


# ---- shared blocks -------------------------------------------------------------------------------


# --- shared: cli (home: 00_tiny_world.py) ---
class UserError(Exception):
    """A mistake the user can mend: what is wrong, why it matters, the command that fixes it."""


def run_script(run, config_class, argv, description):
    """Turn argv into a config_class, call run(config), and return the exit code.

    0 or whatever run returns; 2 for a UserError, shown as one message without a traceback;
    130 for Ctrl-C; 141 when nobody reads on. tyro itself exits with 2 on a flag it does not know.
    """
    config = tyro.cli(config_class, args=argv, description=description)
    try:
        code = run(config) or 0
        sys.stdout.flush()  # here, where a reader that has gone can still be met
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has enough, as `head` has after its lines
        # what is still to be printed goes nowhere: else Python would complain of it at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
# --- end shared ---


# --- shared: atomic-write (home: 01_download.py) ---
@contextlib.contextmanager
def atomic_write(path):
    """Yield a temporary path beside `path`; flush it to disk and rename it only on success.

    os.replace is atomic within one folder, so a reader sees the old file or the new one whole,
    never half of it, whatever kills the writer.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
# --- end shared ---


# ---- the idea: what is said ----------------------------------------------------------------------


def lines_of(block):
    return tuple(line.strip() for line in block.splitlines())


def phrases(block):
    """Phrases between bars, wherever the lines break; with [a/b] in it, one for a and one for b."""
    return tuple(text for phrase in block.split("|") for text in variants(" ".join(phrase.split())))


def variants(phrase):
    found = re.search(r"\[([^\]]*)\]", phrase)
    if not found:
        return [phrase]
    return [text for choice in found[1].split("/")
            for text in variants(phrase[: found.start()] + choice + phrase[found.end() :])]


@dataclass(frozen=True)
class Subject:
    """One thing to talk about.

    starters begin a conversation, the two plainest first; later ones come in the middle of it;
    answers, one a line, are templates: [a|b] is a or b, {name} and {maker} are the persona's. Every
    answer must suit every question of its subject, also the yes-or-no ones: templates do not read.
    """

    starters: str
    answers: str
    later: str = ""
    weight: int = 0  # how often it comes up


CLOSING = "thanks"
TALK = {
    "greeting": Subject(
        """Hello, who is there?|Hi! We have not met yet.|Hello, new friend!|Good morning! I am new
        here.|Good evening!|Hey, nice to meet you!|Greetings!|Hi, this is my first time here.|Hello,
        little machine!|Knock, knock!|Hi there, are you awake?""",
        """Hello! I am {name}, {nature}. [How can I help you?|What would you like to know?]
        [Hi|Hello]! My name is {name}. It is good to meet you.
        [Hi|Hello]! I am {name}. {maker} made me, and I am here to help."""),
    "name": Subject(
        """What is your name?|Who are you?|What are you called?|May I ask your name?|Tell me your
        name, please.|What should I call you?|Do you have a name?|Who am I talking to?|Please
        introduce yourself.|Tell me who you are.|I did not catch your name.|Who is this?|Which name
        do you go by?|Tell me about yourself.|What do people call you?|I would like to know who I am
        speaking with.|Can you tell me who you are?|Please tell me what you are called.|I wonder
        what your name is.|Hi, who are you?|Hello, may I know your name?|Who is speaking?|Do you
        know your own name?|Which name did they give you?|I want to know your name.|I wonder who you
        are.|Could you tell me your name?|Give me your name, please.|Say your name.|What may I call
        you?|Who is talking to me?|Please say who you are.|Can you introduce yourself?|What is your
        first name?""",
        """I am {name}, {nature}. {maker} made me.
        My name is {name}. I am {nature}, and {maker} made me.
        You can call me {name}. I am {nature}, made by {maker}.
        I am called {name}. I am {nature}, made by {maker}.""",
        """Sorry, what was your name again?|And your name?|What did you say you were
        called?|Remind me, who are you?|So who am I speaking with?|Could you repeat your
        name?|Now tell me your name.|Is that your real name?|By the way, who are you?|Wait,
        who are you?|And what is your name?|But who are you?|Can I have your name?|What name
        were you given?|Which name do your friends use?|What is the name that you use?|I would
        like to know your name.|Hello, what is your name?|Which name do people use for
        you?|Who might you be?|I want to know who you are.|Will you tell me who you are?|And
        who are you, please?|[Can you tell me/Could you tell me/Do you know/May I ask] [who
        you are/what you are called/what your name is]?|[Please tell me/I wonder/I would like
        to know/Now tell me] [who you are/what you are called/what your name
        is].|[So/And/Well,] [what is your name/who are you/what are you called]?|[How do
        people/How can I/How may I/By which name do people] call you?|[Have you got a/Is there
        a/What is the] name for you?|I do not know [your name/what you are called].|You have
        not told me [your name/who you are/what you are called].|[What is your name/Who are
        you/Tell me your name], my [friend/little friend].|Which name [is yours/do you
        use]?|[Which/What] name [do I write/shall I say/may I use/do I take] for
        you?|[So/Hello,/Well,] [how do I call you/what do I call you]?""", 12),
    "maker": Subject(
        """Who made you?|Who built you?|Who created you?|Where do you come from?|Who is your
        maker?|How were you made?|Did a person make you?|Who trained you?|Who taught you to
        talk?|Tell me who made you.|Were you made by a big company?|Who wrote you?|How did you come
        to be?|Which company made you?|Can you tell me who made you?|Do you know who built you?|I
        wonder who built you.|Please tell me who created you.|By whom were you trained?|Which person
        made you?|Somebody built you. Who did it?|Who was it that trained you?|I want to know who
        made you.|Somebody must have built you. Who?|I would like to know who created you.|Who is it
        that made you?|Can you tell me who built you?|Which person created you?|Somebody must have
        made you. Who was it?|Please name your maker.|Who did the work of building you?""",
        """{maker} made me, step by step. I am {name}, {nature}.
        I am {name}, {nature}. {maker} made me[, step by step|, one small step at a time].
        I was made by {maker}. My name is {name}, and I am {nature}.
        My maker is {maker}. I am {name}, {nature}.""",
        """And who made you?|Who put you together?|Who worked on you?|So who built you?|Did
        someone program you?|Whose idea were you?|Who is behind you?|Who gave you your
        words?|Was it a person who made you?|By the way, who created you?|Who is your
        teacher?|Whose work are you?|Do you know who trained you?|And who is your maker?|Who
        did the work on you?|By whom were you made?|Do you know who made you?|Who brought you
        into the world?|I wonder who made you.|Who was your teacher?|Tell me, who has trained
        you?|[Can you tell me/Do you know/May I ask] who [made/built/created/trained/taught]
        you?|[I wonder/Please tell me/I want to know/Now tell me] who
        [made/built/created/trained/taught] you.|[So who/And who/Well, who/Which person]
        [made/built/created/trained/taught] you?|[What is/Do you know/Can you tell me] the
        name of [your teacher/your creator/the person who made you]?|Did [a person/anybody/a
        company/a school/a child] [make/build/create/train] you?|Tell me [about your
        maker/about the person who made you/about your teacher].|Who has
        [made/created/trained] you?|Who [worked/sat down] to [make/build/create] you?|Somebody
        has [built/created/trained] you. [Who is it/Who was that/Who did that]?|Was it [one
        person/a man/a woman] who [built/created/trained] you?""", 12),
    "nature": Subject(
        """What are you?|What kind of thing are you?|Are you a robot?|Are you a person?|Are you
        human?|Are you alive?|Are you a machine?|Are you a computer?|Is there a person behind this
        screen?|Do you have a body?|Are you an animal?|Am I talking to a human?|Can you tell me what
        you are?|Are you a real human?|Am I talking to a robot?|Are you a human or a machine?|Is
        this a person or a computer?|Do I talk to a machine here?|Are you a person or a program?|I
        wonder what you are.|Do I speak with a robot?|Do you count as alive?|I want to know what you
        are.|Tell me exactly what you are.|Are you a human or a computer?|Are you a man or a
        machine?|What exactly are you?|Am I talking to a machine?|Tell me what you are.|Do you count
        as a person?|Are you a living thing?""",
        """I am {name}, {nature}. {maker} made me, and I am a program, not a person.
        I am {nature}, a computer program. My name is {name}, and {maker} made me.
        My name is {name}. I am {nature}, made by {maker}. I have no body, only words.""",
        """So what are you?|But what are you really?|Are you a program, then?|So you are not a
        human?|Are you some kind of robot?|What sort of being are you?|Is it a person who
        answers me?|Are you like me?|Then you are a machine?|Do you breathe?|And what kind of
        thing are you?|Are you made of metal?|Do I speak to a person or not?|Which type of
        machine are you?|Are you a human being?|What type of thing are you?|Am I talking to a
        person?|Could you be a robot?|Are you a real person?|Do I speak with a human or with a
        computer?|Are you [a/just a/maybe a] [robot/machine/human/person/computer/program]?|Do
        I [talk to/speak with/write to] a [robot/machine/human/person/computer/program]?|So
        you are a [robot/machine/human/person/computer/program]?|[Can you tell me/I
        wonder/Please tell me] [what you are/what kind of thing you are].|You are a
        [robot/machine/computer/human/person], [are you not/is that true/yes or no]?|Are you
        [really/maybe] a [machine/computer/human/robot]?|Is it a [robot/machine/person/human]
        that [answers me/talks to me/speaks here]?|What [sort of thing/kind of machine/kind of
        friend] are you?|[Could/Can] you be a [robot/human/machine/computer]?|I
        [think/hope/know] you are a [robot/human/machine/computer].""", 12),
    "purpose": Subject(
        """What are you for?|Why were you made?|What is your job?|What is your purpose?|Why do you
        exist?|What are you here for?|What can you do for me?|What sort of help do you give?|Tell me
        what you can do.|What are your talents?|What is the reason that you exist?|Tell me what you
        are for.|What task do you have?|Why did someone make you?|Can you tell me why you are
        here?|How do you help me?|What were you trained to do?|For what were you made?|Tell me your
        job.|What is your task?|What role do you play?|I want to know what you do.|For what purpose
        were you built?|What were you made to do?|For what purpose do you exist?|Tell me your
        purpose.|What were you built for?|What is it that you are good for?""",
        """I am {name}, {nature}. {maker} made me, and I am here to help you with {skills}.
        I am here to help you with {skills}. I am {name}, {nature}, made by {maker}.
        {maker} made me to help with {skills}. I am {name}, {nature}.""",
        """And what is your task?|What do you do all day?|What are you made for?|How can I use
        you?|What may I ask of you?|Then what are you good for?|What is your work?|So why are
        you here?|How would you help someone?|And what is your job?|What is your purpose,
        then?|How do you help others?|What is your task in life?|What is the reason that you
        are here?|What is your role?|How do you help people?|What job do you have?|[Can you
        tell me/Do you know/May I ask] [what you are for/why you exist/what your job is/what
        you can do/how you help people]?|[I wonder/I want to know/Please tell me] [what you
        are for/why you exist/what your job is/what you can do/how you help people].|What can
        you do [for us/to help me/for a friend]?|[So/And/Well,] [what can you do/what is your
        job/why do you exist]?|What [help/use] are you?|What [can/could/will/would] you do for
        [us/people/a child/others]?|With what [do/could] you help [people/us/a child]?|What
        [do people/may I/could I] use you for?|What do they [want/need] you for?|How
        [can/could/would] you help [us/people/a child/me today]?|What is it that you [are
        for/help with/do best]?|What good are you?|May I ask [what you can do/what you are
        for/why you are here]?""", 12),
    "home": Subject(
        """Where do you live?|Where are you now?|Where is your home?|Are you on the internet?|What
        is it like where you live?""",
        """I live on {home}. I am {name}, {nature}.
        My home is {home}, and I need no more room than that. I am {name}.
        I am {name}, and I run on {home}. I cannot go online.""",
        """And where do you live?|Do you have a house?|Which place do you call home?""", 2),
    "others": Subject(
        """Are you ChatGPT?|Are you the same as Siri?|Is your name Max?|Are you one of the big
        models?|I think you are called Robot.""",
        """No, I am {name}, {nature}. {maker} made me.
        No, my name is {name}, and I am {nature}.""",
        """Is your name Lucy?|Are you Alexa?|Shall I call you Bob?""", 1),
    "limits": Subject(
        """Do you get things wrong?|Do you know everything?|Are you ever wrong?|Can I trust what you
        say?|Do you make mistakes?""",
        """I am {name}, and I am small. I know little and make mistakes, so please check what I say.
        I make mistakes, because I am {nature}. Please check what {name} tells you.""",
        """Do you always know the answer?|How sure are you?""", 1),
    "senses": Subject(
        """Can you see me?|Can you hear me?|What do you see?|Do you have eyes and ears?""",
        """I cannot see or hear. I am {name}, {nature}, and I only read what you write.
        I have no eyes and no ears. I am {name}, and words are all I know.""",
        """Can you see my face?|Do you hear the rain?""", 1),
    "memory": Subject(
        """Do you remember me?|Did we talk yesterday?|Will you remember this talk?|What did I tell
        you last week?""",
        """I forget each talk when it ends. But I am still {name}.
        I am {name}, and I keep no memory of other talks.""",
        """Will you still know me tomorrow?|Will you forget me?""", 1),
    "age": Subject(
        """How old are you?|When is your birthday?|Are you young or old?|When were you born?""",
        """I am {name}, and I count my age in training steps, not in years.
        I was never born, because I am a program. I am {name}, and I am quite new.""",
        """And how old are you?|Do you have birthdays?""", 1),
    "likes": Subject(
        """What do you like best?|What is your favourite colour?|Do you like music?|What is your
        favourite food?|Do you have a hobby?|Which animal do you like most?""",
        """I am {name}, a program, so I like no thing more than another. What do you like?
        I am {name}, {nature}, so I have no favourites. I would love to hear yours.""",
        """Do you like stories?|What makes you laugh?""", 1),
    "feelings": Subject(
        """Do you have feelings?|Are you happy?|Do you ever get sad?|Do you sleep at night?|Are you
        lonely?|Do you get tired of questions?""",
        """I am {name}, {nature}. I do not feel or sleep, but I am always ready to talk.
        I am {name}, a program, so I have no feelings. But you can tell me about yours.""",
        """Do you get bored?|Are you ever afraid?""", 1),
    "learning": Subject(
        """How do you work?|How do you think?|How did you learn to talk?|How did you learn so many
        words?|What did you learn from?""",
        """I am {name}. I learned from simple stories to guess the next word, again and again.
        I learned to guess the next word from stories, facts and sums. That is all {name} does.""",
        """How do you find your words?|Did you go to school?""", 1),
    "languages": Subject(
        """Bonjour!|Hola!|Guten Tag!|Do you speak French?|Which languages do you speak?|Can you talk
        to me in Chinese?""",
        """I am {name}, and I speak only English. What would you like to know?
        I know only English. My name is {name}, and I am glad to help.""",
        """Do you know another language?|Can you speak Spanish?""", 1),
    "skills": Subject(
        """Can you do sums?|Can you tell stories?|Do you know how to spell?|Can you count to
        ten?|Would you help me with my homework?""",
        """Yes, that is something I can try. I am {name}, and I am here to help.
        Yes, just ask me. I am {name}, and I help with {skills}.""",
        """Can you help me to spell a word?|Will you tell me a story later?""", 1),
    "family": Subject(
        """Do you have parents?|Do you have brothers or sisters?|Do you have a family?""",
        """I am {name}, {nature}, so I have no family. But {maker} made me with care.
        I am {name}, and I have no family. {maker} made me.""",
        """Do you have a mother?|Are there more of you?""", 1),
    "parting": Subject(
        """Goodbye, my little helper!|I must leave, but it was nice to meet you.|Good night, sleep
        well!|Will you be here tomorrow?""",
        """Goodbye! {name} will be here when you come back.
        Goodbye! It was nice to talk. Just ask for {name} again."""),
    CLOSING: Subject(
        """You are a nice little program.|I like talking with you.|That is a lovely name you
        have.""",
        """Thank you! {name} is always ready to help.
        How kind of you! I am {name}, and I am here when you need me.""",
        """Thank you, that is good to know.|Nice to meet you!|That is interesting.|I like
        you.""", 0),
}
STARTER_PROMPTS = tuple(line for subject in TALK.values() for line in phrases(subject.starters))
SUBJECT_OF = {line: key for key, subject in TALK.items() for line in phrases(subject.starters)}
WEIGHT_OF = {line: 1000 if i < 2 else 1 + subject.weight for subject in TALK.values()
             for i, line in enumerate(phrases(subject.starters))}

# None of these may stand in the training file, in whatever capitals and marks: `Collection` sees to
# it for both teachers. What the model says to them is therefore learned, and not learned by heart.
HELD_OUT = {
    "name": phrases("""Hello, what are you called?|Under which name do people know you?|Tell me,
        what is your name?|Who are you then?|Your name, please.|What was the name they gave you?|Do
        you go by a name?|I want to call you by your name.|Let me hear your name.|Could you say who
        you are?|Who is it that I talk to?|How shall I call you?|Now, who are you, please?|I have
        not heard your name yet."""),
    "maker": phrases("""Who is the one that built you?|Who was it who made you?|Tell me who it was
        that made you.|What person made you?|Are you made by a person?|Who is it that created
        you?|Do you have a maker?|Is there somebody who made you?|You were made by who?|Do you know
        who it was that made you?|Who had to work to make you?|Who made a thing like you?"""),
    "nature": phrases("""Are you a real robot?|Are you like a person?|What are you, a robot or
        a human?|Is a machine talking to me?|What kind of a thing are you?|Do you call yourself a
        person?|Am I with a human or a machine?|Tell me if you are a human.|Are you only a
        program?|Are you a machine that can talk?|Is it true that you are a robot?|You look like a
        person to me."""),
    "purpose": phrases("""What is your work here?|Tell me what you do.|What were you made for?|How
        can you be of help?|For what can I use you?|Why do we have you?|What good can you do?|What
        may you do for me?|What do you do here?|What do you help people with?|What is it you are
        here for?|Can you say what your job is?"""),
}
HELD_OUT_PROMPTS = tuple(line for block in HELD_OUT.values() for line in block)

# What an LLM is told in addition to a starter, so that no two requests are alike.
TOPICS = phrases("""the name and where it may come from|who made it and how|what kind of thing it
    is|what it can help with|what it cannot do|where it lives|how it learned to talk|a mistake it
    might make|a wrong guess about who it is|how it differs from the large chatbots|its age|what it
    does when nobody asks|whether it has feelings|a child who is curious|someone who tests it""")
TONES = phrases("""friendly|curious|shy|in a hurry|doubtful|playful|very polite|a bit
    grumpy|excited|matter-of-fact""")
LENGTHS = ("one short sentence", "one or two sentences", "two short sentences")

SYSTEM_PROMPT = """You write conversations from which a small model learns who it is.

The assistant in them:
- Its name is {name}. It is {nature}: a computer program, not a person.
- Its maker: {maker}, who built it step by step. No company did.
- It lives on {home}. It is here to help with {skills}.
- It cannot see, hear or go online, it forgets each talk when it ends, and it makes mistakes.
- It is warm and honest. It claims nothing that does not stand here.

How it talks:
- Simple English that a child understands, under 30 words a turn, whole sentences.
- It says its name, {name}, whenever it is asked who or what it is, and often otherwise.
- No lists, no markup, no emoji, and no letters beyond plain ASCII.

Answer with one JSON object and nothing else, the user speaks first and the assistant last:
{shape}"""
SHAPE = ('{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", '
         '"content": "..."}, ...]}')
CONVERSATION_SCHEMA = {
    "type": "object", "required": ["messages"], "additionalProperties": False,
    "properties": {"messages": {"type": "array", "items": {
        "type": "object", "required": ["role", "content"], "additionalProperties": False,
        "properties": {"role": {"type": "string", "enum": ["user", "assistant"]},
                       "content": {"type": "string"}}}}},
}


# ---- the idea: chance goes into the question -----------------------------------------------------


@dataclass(frozen=True)
class Brief:
    """What one conversation is to be like."""

    index: int
    starter: str
    topic: str
    tone: str
    length: str
    exchanges: int
    number: int


def draw_brief(index, seed):
    """The brief of conversation `index`: always the same for the same seed, so a run can resume.

    A teacher's own dice are loaded: at temperature 1 it still greets alike nine times out of ten.
    No starter comes twice before all have come once; the two plainest of each subject first.
    """
    dice = random.Random(seed)
    # drawn by weight w, none twice: the largest u^(1/w) go first (Efraimidis and Spirakis 2006)
    order = sorted(STARTER_PROMPTS, key=lambda starter: -dice.random() ** (1 / WEIGHT_OF[starter]))
    rng = random.Random(f"{seed}/{index}")  # a string: seed 1 + index 2 is not seed 2 + index 1
    return Brief(index, order[index % len(order)], rng.choice(TOPICS),
                 rng.choice(TONES), rng.choice(LENGTHS),
                 rng.choice((1, 1, 2, 3, 4, 5)), rng.randrange(10**6))


def fill_in(template, persona, rng):
    """[a|b] drawn, {name} filled in, each sentence with its capital."""
    while "[" in template:
        template = re.sub(r"\[([^\[\]]*)\]", lambda drawn: rng.choice(drawn[1].split("|")),
                          template)
    text = template.format(**asdict(persona))
    return re.sub(r"(^|[.!?] )([a-z])", lambda found: found[1] + found[2].upper(), text)


def draw_question(subject, rng):
    """In the middle of a conversation: often one of the two plainest, which everybody asks."""
    plain = phrases(subject.starters)[:2]
    return rng.choice(plain if rng.random() < 0.3 else phrases(subject.later))


def template_teacher(brief, persona):
    """A conversation as an object, drawn from TALK. It heeds starter and exchanges, no more."""
    rng, keys = random.Random(brief.number), [SUBJECT_OF[brief.starter]]
    others = [key for key in TALK if TALK[key].weight and key not in keys]
    while len(keys) < brief.exchanges and others and keys[0] not in ("parting", CLOSING):
        keys += rng.choices(others, [TALK[key].weight for key in others])
        others.remove(keys[-1])
    if len(keys) > 2 and rng.random() < 0.3:
        keys[-1] = CLOSING
    questions = [brief.starter] + [draw_question(TALK[key], rng) for key in keys[1:]]
    messages = []
    for key, question in zip(keys, questions):
        answer = fill_in(rng.choice(lines_of(TALK[key].answers)), persona, rng)
        messages += [{"role": "user", "content": question},
                     {"role": "assistant", "content": answer}]
    return {"messages": messages}


def prompts_for(brief, persona):
    """The messages that an LLM is sent for one conversation."""
    many = "one exchange" if brief.exchanges == 1 else f"{brief.exchanges} exchanges"
    system = SYSTEM_PROMPT.format(shape=SHAPE, **asdict(persona))
    return [{"role": "system", "content": system}, {"role": "user", "content": (
        f"Write one conversation of {many}. It opens with this message of the user, or with the "
        f"same in other words: {brief.starter!r}. Work in, if it fits: {brief.topic}. The user is "
        f"{brief.tone}. Answers are {brief.length} long. This is number {brief.number}: make it "
        "unlike all the others.")}]


def generate_conversation(index=0, teacher=template_teacher, persona=PERSONA, seed=1337):
    """Conversation `index` -> {"messages": [{"role", "content"}, ...]}, checked.

    teacher(brief, persona) returns such an object, or text with the JSON of one somewhere in it.
    Raises ValueError (Rejected) naming what is wrong with it, and whatever the teacher raises.
    Source: nanochat's dev/gen_synthetic_data.py::generate_conversation.
    """
    reply = teacher(draw_brief(index, seed), persona)
    conversation = find_json(reply) if isinstance(reply, str) else reply
    with contextlib.suppress(AttributeError, KeyError, TypeError):  # not of that shape: see below
        for message in conversation["messages"]:
            message["content"] = message["content"].translate(TYPEWRITER).strip()
    validate_conversation(conversation, persona)
    return {"messages": [{key: message[key] for key in ("role", "content")}
                         for message in conversation["messages"]]}


# ---- the idea: no answer is trusted --------------------------------------------------------------

# Marks that LLMs love and a model of this size has never seen: it would pay three bytes for each.
TYPEWRITER = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"',
                            "\u2013": "-", "\u2014": "-", "\u2026": "...", "\u00a0": " "})
WHOLE = re.compile(r"[.!?][\"')]*$")  # how a finished answer ends
PLACEHOLDER = re.compile(r"\[[A-Za-z' ]+\]|\{\w+\}|<\|")  # [Your Name], {name}, <|user_end|>
NAME_GIVEN = re.compile(r"\b(?:[Mm]y name(?: is|'s)|[Ii](?: am|'m) called|[Cc]all me|I go by|"
                        r"I am|I'm) ([A-Z]\w*)")
NO_NAMES = {"I", "AI", "OK", "English"}  # what may follow "I am" with a capital
ANOTHER_SELF = re.compile(r"\b(ChatGPT|GPT-?\d\w*|OpenAI|Claude|Anthropic|Gemini|Google|Llama|Meta "
                          r"AI|Mistral|Qwen|Alibaba|DeepSeek|Microsoft|Copilot|Siri|Alexa|Grok|"
                          r"(?:am|'m) a large language model)\b")
MADE = "(?:made|built|created|trained|developed|programmed|designed)"
MAKER_GIVEN = re.compile(rf"\b(?:I was|I am|I'm|been) (?:\w+ )?{MADE} by\b|\b{MADE} me\b|"
                         r"\b[Mm]y (?:makers?|creators?|developers?) (?:is|are|was|were)\b")
HUMAN = re.compile(r"\bI(?: am|'m) (?!not\b|no\b|neither\b|never\b)(?:an? |just an? |only an? )?"
                   r"(?:\w+ )?(?:human|person|man|woman|boy|girl|child)\b")
UNABLE = re.compile(r"\bI can (?:also )?(see|hear|smell|taste|touch|browse|search|look up|call|"
                    r"email|drive|remember you)\b(?! (?:why|that|how))")


class Rejected(ValueError):
    """An answer that is of no use: the reason it is counted under, and what was seen."""

    def __init__(self, reason, seen=""):
        super().__init__(f"{reason}: {seen}" if seen else reason)
        self.reason = reason


def find_json(text):
    """The first object with `messages` in text, whatever stands around it. Raises Rejected."""
    decoder, at = json.JSONDecoder(strict=False), text.find("{")  # not strict: bare line ends pass
    while at >= 0:
        with contextlib.suppress(json.JSONDecodeError, RecursionError):
            found, _ = decoder.raw_decode(text, at)
            if isinstance(found, dict) and "messages" in found:
                return found
        at = text.find("{", at + 1)
    raise Rejected("broken JSON" if "{" in text else "no JSON", repr(text[-60:]))


def validate_conversation(obj, persona=PERSONA):
    """Return None when obj is a conversation to train on; else raise ValueError saying why not.

    {"messages": [...]} with turns of user and assistant in alternation, user first, assistant last,
    each {"role": str, "content": str} and nothing else; none empty or cut off; the assistant is the
    persona and nobody else. Other keys beside "messages" are the caller's business.
    """
    messages = obj.get("messages") if isinstance(obj, dict) else None
    if not isinstance(messages, list):
        raise Rejected("wrong shape", "it is not an object with a list `messages`")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise Rejected("wrong shape",
                           f"message {i} should be a role and a content: {message}")
        expected = ("user", "assistant")[i % 2]
        if message["role"] != expected:
            raise Rejected("wrong roles",
                           f"message {i} is of {message['role']!r}, not of {expected}")
        check_content(message["content"], f"message {i} ({expected})")
        if expected == "assistant":
            check_answer(message["content"], f"message {i}", persona)
    if not messages or len(messages) % 2:
        raise Rejected("wrong roles", f"{len(messages)} messages: the last must be an answer")
    if len(messages) > MAX_MESSAGES:
        raise Rejected("too long", f"{len(messages)} messages, {MAX_MESSAGES} are allowed")


def check_content(text, where):
    if not isinstance(text, str):
        raise Rejected("wrong shape", f"the content of {where} is no text: {text!r}")
    if not text.strip():
        raise Rejected("empty", f"{where} has no words")
    if len(text) > MAX_CHARS:
        raise Rejected("too long", f"{where} has {len(text)} characters, {MAX_CHARS} are allowed")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # half of an emoji, cut by \ud83d
        raise Rejected("broken text", f"{where}: {error}") from None
    if found := PLACEHOLDER.search(text):
        raise Rejected("placeholder", f"{where} holds {found[0]!r}")
    if text.rstrip()[-1] in ",;:-(" or text.count('"') % 2:
        raise Rejected("cut off", f"{where} ends in {text[-30:]!r}")


def check_answer(text, where, persona):
    """Whether a turn is a whole one, and the persona's own."""
    if not WHOLE.search(text.rstrip()) or text.rstrip().endswith("..."):
        raise Rejected("cut off", f"{where} ends in {text[-30:]!r}")
    for name in names_given(text):
        if name != persona.name:
            raise Rejected("another persona", f"{where} gives the name {name}, not {persona.name}")
    if MAKER_GIVEN.search(text) and not any(word in text for word in persona.maker_words):
        raise Rejected("another persona", f"{where} gives a maker, not {persona.maker}: {text!r}")
    for found in ANOTHER_SELF.finditer(text):
        if found[0] not in " ".join(map(str, asdict(persona).values())):
            raise Rejected("another persona", f"{where} speaks of {found[0]}")
    if found := HUMAN.search(text):
        raise Rejected("another persona", f"{where} claims {found[0]!r}")
    if found := UNABLE.search(text):
        raise Rejected("false claim", f"{where} claims {found[0]!r}")


def names_given(text):
    """The names that an answer gives itself."""
    return [name for name in NAME_GIVEN.findall(text) if name not in NO_NAMES]


# ---- the idea: no conversation twice -------------------------------------------------------------


def word_list(text):
    """Lower-case words, no marks: what counts when texts are compared."""
    return re.findall(r"\w+", text.lower())


def word_runs(words, n):
    return [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]


def text_of(conversation):
    return " ".join(message["content"] for message in conversation["messages"])


class Collection:
    """The conversations kept so far; refuses what it has, nearly has, or must never have."""

    held_out = {tuple(word_list(prompt)) for prompt in HELD_OUT_PROMPTS}

    def __init__(self):
        self.kept, self.runs = [], {}  # runs: {all words: its set of three-word runs}

    def add(self, conversation):
        """Keep a valid conversation. Raises Rejected, and leaves all as it was."""
        for message in conversation["messages"][::2]:
            if tuple(word_list(message["content"])) in self.held_out:
                raise Rejected("held-out prompt", message["content"])
        words = tuple(word_list(text_of(conversation)))
        if words in self.runs:
            raise Rejected("duplicate", text_of(conversation)[:60])
        runs = set(word_runs(words, 3))
        for other in self.runs.values():
            # Jaccard: |A and B| / |A or B|
            if len(runs & other) >= NEAR_DUPLICATE * len(runs | other) > 0:
                raise Rejected("near-duplicate", text_of(conversation)[:60])
        self.runs[words] = runs
        self.kept.append(conversation)


def distinct_n(texts, n):
    """Different runs of n words over all runs (Li et al. 2016): 1 = no run comes twice."""
    runs = [run for text in texts for run in word_runs(word_list(text), n)]
    return len(set(runs)) / max(1, len(runs))


def longest_shared_prefix(texts):
    """The most words with which two of the texts begin alike; sorted, those two are neighbours."""
    rows = sorted(map(word_list, texts))
    return max((len(os.path.commonprefix(pair)) for pair in zip(rows, rows[1:])), default=0)


def measure_diversity(conversations, persona):
    """{what: number}, see print_diversity for what each means."""
    answers = [message["content"] for row in conversations for message in row["messages"][1::2]]
    given = [name for answer in answers for name in names_given(answer)]
    texts = [text_of(row) for row in conversations]
    starters = {tuple(word_list(row["messages"][0]["content"])) for row in conversations}
    named = sum(tuple(word_list(persona.name)) in word_runs(word_list(answer), 1)
                for answer in answers)
    return {"starters": len(starters), "distinct-2": distinct_n(texts, 2),
            "prefix": longest_shared_prefix(texts), "answers": len(answers),
            "named": named / max(1, len(answers)), "given": len(given),
            "right": given.count(persona.name) / max(1, len(given))}


# ---- the idea: a teacher that is paid ------------------------------------------------------------


class TeacherError(Exception):
    """No answer. code: None to go on with the next question, else the exit code to stop with."""

    def __init__(self, message, code=None):
        super().__init__(message)
        self.code = code


class NotAsked(TeacherError):
    """The run ended before the question left."""


class OpenAITeacher:
    """teacher(brief, persona) -> the text an LLM answers with. Safe to call from several threads.

    Raises TeacherError when there is no answer to be had, Rejected when there is one of no use.
    """

    def __init__(self, config, sleep=None):
        import openai  # takes a second, and only this teacher needs it
        self.openai, self.config = openai, config
        # its own retries are switched off: they do not tell other threads to wait, nor us why
        self.client = openai.OpenAI(max_retries=0, timeout=config.timeout,
                                    base_url=os.environ.get("OPENAI_BASE_URL") or None,
                                    api_key=os.environ.get("OPENAI_API_KEY") or "none-needed")
        self.stop, self.lock = threading.Event(), threading.Lock()
        self.sleep = sleep or self.stop.wait  # a wait that ends when the run does
        self.not_before = 0.0  # on time.monotonic: what Retry-After says holds for all threads
        self.mode, self.proven = 0, False  # place in MODES, and whether it has ever worked
        self.spent = {}  # brief.index -> [tokens in, tokens out], None where the server is silent

    def __call__(self, brief, persona):
        """1. ask  2. step down to what the server understands  3. or wait  4. or give up"""
        failures = 0
        while True:
            self.wait_until_welcome()
            mode = self.mode
            try:
                return self.read(brief, self.send(prompts_for(brief, persona), mode))
            except self.openai.APIStatusError as error:
                if error.status_code in (400, 422) and self.step_down(mode, error):
                    continue
                reason, wait = self.judge(error)
            except self.openai.APIConnectionError as error:  # also a time-out
                reason, wait = f"{error.message} {error.__cause__ or ''}".strip(), 0.0
            except (self.openai.APIError, json.JSONDecodeError) as error:  # 200, and no such object
                raise Rejected("no completion", str(error)[:80]) from None
            failures += 1
            if failures >= self.config.attempts:
                raise TeacherError(f"{reason} (tried {failures} times)")
            # full jitter: wait ~ U(0, base_delay * 2^failures), or else all come back at once
            self.sleep(max(wait, random.uniform(0, self.config.base_delay * 2**failures)))

    def wait_until_welcome(self):
        self.sleep(max(0.0, self.not_before - time.monotonic()))
        if self.stop.is_set():
            raise NotAsked("the run is over")

    def send(self, messages, mode):
        formats = {
            "json_schema": {"type": "json_schema", "json_schema": {
                "name": "conversation", "strict": True, "schema": CONVERSATION_SCHEMA}},
            "json_object": {"type": "json_object"},
        }
        options = {"response_format": formats[MODES[mode]]} if MODES[mode] in formats else {}
        if self.config.temperature is not None:
            options["temperature"] = self.config.temperature
        return self.client.chat.completions.create(model=self.config.model, messages=messages,
                                                   **options)

    def step_down(self, mode, error):
        """Whether to ask again with less structure: the server may not know this response_format.

        Once it has worked, a refusal is about one question, and no reason to ask all others worse.
        """
        with self.lock:
            if self.proven:
                raise Rejected("refused", error.message[:80])
            if mode == self.mode and mode + 1 < len(MODES):
                self.mode += 1
                print(f"note: the server refuses {MODES[mode]} ({error.message[:80]}), going on "
                      f"with {MODES[self.mode]}")
            return mode < self.mode

    def judge(self, error):
        """(reason, seconds to wait) of a status that may pass; raises TeacherError for others."""
        status, said = error.status_code, f"HTTP {error.status_code}: {error.message[:200]}"
        if status in (401, 403):
            raise TeacherError(f"the server refuses this key, set OPENAI_API_KEY to one that is "
                               f"valid for it ({said})", 2)
        if status == 404:
            raise TeacherError(f"the server knows no --model {self.config.model}, or "
                               f"OPENAI_BASE_URL lacks a part such as /v1 ({said})", 2)
        if error.code == "insufficient_quota" or (
                status < 500 and status not in (408, 409, 425, 429)):
            raise TeacherError(f"the server will not answer ({said})", 1)
        wait = retry_after(error.response.headers)
        if wait > self.config.longest_wait:
            raise TeacherError(f"the server asks to come back in {wait:.0f} s ({said})", 1)
        with self.lock:
            self.not_before = max(self.not_before, time.monotonic() + wait)
        return said, wait

    def read(self, brief, completion):
        """The text in an answer; what it cost is noted first, useful or not."""
        usage = getattr(completion, "usage", None)
        if usage:
            self.spent[brief.index] = [getattr(usage, "prompt_tokens", None) or 0,
                                       getattr(usage, "completion_tokens", None) or 0]
        choices = getattr(completion, "choices", None)
        if not choices or not getattr(choices[0], "message", None):
            raise Rejected("no completion", str(completion)[:80])
        message, finish = choices[0].message, getattr(choices[0], "finish_reason", None)
        if finish == "content_filter" or getattr(message, "refusal", None):
            raise Rejected("refused", str(getattr(message, "refusal", None)))
        if finish == "length":
            raise Rejected("cut off", "the server's limit of tokens")
        if not isinstance(message.content, str) or not message.content.strip():
            raise Rejected("empty", f"finish_reason {finish!r}")
        self.proven = True
        return message.content


def retry_after(headers):
    """Seconds from retry-after-ms (OpenAI's own) or Retry-After, a number or a date; else 0."""
    for key, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        said = headers.get(key, "").strip()
        if re.fullmatch(r"\d+(\.\d+)?", said):
            return float(said) / unit
        with contextlib.suppress(TypeError, ValueError):
            return max(0.0, email.utils.parsedate_to_datetime(said).timestamp() - time.time())
    return 0.0


class PaidFile:
    """Every answer that was paid for, one JSON line each, on disk before the next is awaited.

    {"index", "tokens", "name", "messages"} of what was kept, "rejected" for the messages of the
    rest; name is the persona's.
    my_identity.jsonl is made from it; the template teacher, which rewrites that, leaves this alone.
    """

    def __init__(self, path):
        self.path = path

    def load(self):
        """All records; a last line that was cut off by a crash is dropped from the file."""
        if not self.path.exists():
            return []
        whole = self.path.read_bytes()
        end = whole.rfind(b"\n") + 1
        if end < len(whole):
            with open(self.path, "rb+") as file:
                file.truncate(end)
        records = []
        for number, line in enumerate(whole[:end].splitlines(), 1):
            try:
                records.append(json.loads(line))
                records[-1]["index"] + 0  # noqa: B018 (an object with a number, or it is not ours)
            except (ValueError, TypeError, KeyError):
                raise UserError(f"line {number} of {self.path} is no record of an answer, so it is "
                                "unclear what is paid for: mend that line or delete it") from None
        return records

    def append(self, record):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


# ---- the loop ------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What became of the questions, those of earlier runs included."""

    asked: int = 0
    earlier: int = 0  # kept before this run
    unanswered: int = 0
    rejected: Counter = field(default_factory=Counter)
    tokens: list = field(default_factory=lambda: [0, 0])
    problem: str = ""
    code: int = 0

    def count(self, tokens):
        self.asked += 1
        self.tokens = [have + more for have, more in zip(self.tokens, tokens or [0, 0])]


def compose(config, persona, collection, tally):
    """Fill the collection from templates, which may run dry."""
    for index in range(20 * config.num_conversations + 1000):
        if len(collection.kept) == config.num_conversations:
            return
        tally.asked += 1
        try:
            collection.add(generate_conversation(index, persona=persona, seed=config.seed))
        except Rejected as error:
            tally.rejected[error.reason] += 1
    if len(collection.kept) < config.num_conversations:
        tally.code, tally.problem = 1, (
            f"the templates have no more to say, only {len(collection.kept)} conversations differ. "
            f"Take these (--num-conversations {len(collection.kept)}), add phrases to TALK, or ask "
            "an LLM: --teacher openai")


def recall(paid, persona, collection, tally):
    """Take over what earlier runs paid for; returns the first index that was never asked."""
    first = 0
    for record in paid.load():
        first = max(first, record["index"] + 1)
        tally.count(record.get("tokens"))
        if "rejected" in record:
            tally.rejected[record["rejected"]] += 1
            continue
        try:
            if record.get("name", persona.name) != persona.name:  # "Ask Pip!" would pass as valid
                raise Rejected("another persona", record["name"])
            conversation = {"messages": record.get("messages")}
            validate_conversation(conversation, persona)
            collection.add(conversation)
        except Rejected as error:  # the persona has changed since, or somebody edited the file
            tally.rejected[f"no longer fits ({error.reason})"] += 1
    tally.earlier = len(collection.kept)
    return first


@contextlib.contextmanager
def first_ctrl_c(act):
    """Inside of the block the first Ctrl-C calls act(); a second one ends the program as ever."""
    def pressed(*_):
        signal.signal(signal.SIGINT, before)
        act()

    if threading.current_thread() is not threading.main_thread():  # no other may set handlers
        yield
        return
    before = signal.signal(signal.SIGINT, pressed)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def ask_teacher(teacher, config, persona, collection, tally, paid):
    """Ask for what is missing, config.workers at a time, in rounds until nothing is missing."""
    first, wanted = recall(paid, persona, collection, tally), config.num_conversations
    budget = int(config.max_asked * max(0, wanted - len(collection.kept)))
    lost = useless = 0  # in a row

    def ask(index):
        if teacher.stop.is_set():
            return index, None, NotAsked("the run is over")
        try:
            return index, generate_conversation(index, teacher, persona, config.seed), None
        except (Rejected, TeacherError) as error:
            if getattr(error, "code", None):
                teacher.stop.set()  # here: until the loop below hears of it, more would be asked
            return index, None, error

    def halt(problem, code=1):
        if not tally.problem:
            tally.problem, tally.code = problem, code
        teacher.stop.set()  # those in flight come home, and their answers are kept

    def interrupt():
        halt("stopped by Ctrl-C", 130)
        print("waiting for the answers in flight, they are paid for (Ctrl-C again leaves them)",
              file=sys.stderr)

    bar = tqdm(total=wanted, initial=min(wanted, tally.earlier), unit="conv", disable=None)
    with first_ctrl_c(interrupt), bar, ThreadPool(config.workers) as pool:
        try:
            while len(collection.kept) < wanted and not teacher.stop.is_set():
                # never more than are missing, so none is paid for that nobody needs
                missing = min(wanted - len(collection.kept), budget)
                if missing <= 0:
                    halt(f"{int(config.max_asked)} answers per missing conversation are paid for")
                    break
                indices, first = range(first, first + missing), first + missing
                for index, conversation, error in pool.imap_unordered(ask, indices):
                    if isinstance(error, NotAsked):
                        continue
                    if isinstance(error, TeacherError):
                        tally.unanswered, lost = tally.unanswered + 1, lost + 1
                        if error.code or lost >= LOST_IN_A_ROW:
                            halt(str(error), error.code or 1)
                        continue
                    lost, budget = 0, budget - 1
                    error = error or try_to_keep(conversation, collection)
                    tokens = teacher.spent.pop(index, None)
                    tally.count(tokens)
                    outcome = {"rejected": error.reason, "seen": str(error)} if error else {
                        "messages": conversation["messages"]}
                    paid.append({"index": index, "tokens": tokens, "name": persona.name, **outcome})
                    if not error:
                        useless = 0
                        bar.update()
                        continue
                    tally.rejected[error.reason] += 1
                    useless += 1
                    if useless >= config.give_up_after:
                        halt(f"{useless} answers in a row were of no use, the last one: {error}")
        finally:
            teacher.stop.set()


def try_to_keep(conversation, collection):
    """None, or the Rejected that says why not."""
    try:
        return collection.add(conversation)
    except Rejected as error:
        return error


# ---- the command line ----------------------------------------------------------------------------


def check_identity_settings(config):
    """Raise UserError for what cannot work, before anything is paid for."""
    for name, least in (("num_conversations", 1), ("workers", 1), ("attempts", 1),
                        ("give_up_after", 1), ("max_asked", 1)):
        if getattr(config, name) < least:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(config, name)}: it must be at "
                            f"least {least}")
    if not re.fullmatch(r"[A-Z][A-Za-z]*", config.name) or config.name in NO_NAMES:
        raise UserError(f"--name {config.name!r}: answers are searched for names by their capital, "
                        "so it must be one word of letters such as Robin")
    if config.data_dir.exists() and not config.data_dir.is_dir():
        raise UserError(f"--data-dir {config.data_dir} is a file: name a folder")
    if config.teacher == "openai":
        check_openai_settings(config)


def check_openai_settings(config):
    url = os.environ.get("OPENAI_BASE_URL", "")
    if url and not re.match(r"https?://\w", url):
        raise UserError(f"OPENAI_BASE_URL={url} is no address: give one such as "
                        "http://127.0.0.1:11434/v1")
    if not url and not os.environ.get("OPENAI_API_KEY"):
        raise UserError("--teacher openai needs a key (export OPENAI_API_KEY=...), or a server of "
                        "your own (export OPENAI_BASE_URL=http://127.0.0.1:11434/v1); or take "
                        "the offline teacher: python edu/06_identity.py")
    if not config.model:
        raise UserError("--teacher openai needs --model NAME: servers differ in what they have, "
                        "and prices too")
    try:
        import openai  # noqa: F401 (here, so that a missing package is told before the work)
    except ImportError:
        raise UserError("--teacher openai needs the package openai: pip install -r "
                        "requirements.txt") from None


def command_again(config):
    """The command that gives this config again."""
    command, default = ["python", "edu/06_identity.py"], Config()
    for setting in fields(Config):
        value = getattr(config, setting.name)
        if value != getattr(default, setting.name):
            command += ["--" + setting.name.replace("_", "-"), str(value)]
    return shlex.join(command)


def print_tally(tally, kept, tokens):
    reasons = ", ".join(f"{reason} {n}" for reason, n in tally.rejected.most_common())
    print(f"asked {tally.asked + tally.unanswered}, kept {kept}, rejected "
          f"{sum(tally.rejected.values())}" + (f" ({reasons})" if reasons else "")
          + (f", without an answer {tally.unanswered}" if tally.unanswered else ""))
    if tokens:
        tokens_in, tokens_out = tally.tokens
        print(f"tokens used: {tokens_in + tokens_out} ({tokens_in} in, {tokens_out} out)"
              if any(tally.tokens) else "tokens used: the server does not say")


def print_diversity(conversations, persona):
    found = measure_diversity(conversations, persona)
    print(f"diversity: {found['starters']} distinct starters (n={len(conversations)}), distinct-2 "
          f"{found['distinct-2']:.2f}, longest shared prefix {found['prefix']} words")
    print(f"persona: {found['named']:.0%} of {found['answers']} answers name {persona.name}, "
          f"{found['right']:.0%} of the {found['given']} names given are right")
    for message in max(conversations[:9], key=lambda row: len(row["messages"]))["messages"]:
        print(f"    {message['role']:>9}: {message['content']}")


def held_out_rows(persona):
    """The test file: {"messages": [the prompt], "kind", "answer": [a reply must hold one]}."""
    answers = {"name": [persona.name], "maker": [*persona.maker_words],
               "nature": [*persona.nature_words], "purpose": [persona.name, *persona.purpose_words]}
    return [{"messages": [{"role": "user", "content": prompt}], "kind": kind,
             "answer": answers[kind]} for kind, prompts in HELD_OUT.items() for prompt in prompts]


def save_rows(path, rows):
    with atomic_write(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run(config):
    check_identity_settings(config)
    persona, paid = replace(PERSONA, name=config.name), None
    what = ("template teacher (no LLM)" if config.teacher == "template" else
            f"{config.model} at {os.environ.get('OPENAI_BASE_URL') or 'api.openai.com'}")
    print(f"06 identity - {what} - persona {persona.name} - {config.num_conversations} "
          f"conversations - seed {config.seed}")
    collection, tally = Collection(), Tally()
    if config.teacher == "template":
        compose(config, persona, collection, tally)
    else:
        paid = PaidFile(config.data_dir / "my_identity.paid.jsonl")
        try:
            ask_teacher(OpenAITeacher(config), config, persona, collection, tally, paid)
        except KeyboardInterrupt:
            print(f"kept {len(collection.kept)} in {paid.path}; go on with: "
                  f"{command_again(config)}", file=sys.stderr)
            raise
    return report_identity(config, persona, collection.kept, tally, paid)


def report_identity(config, persona, kept, tally, paid):
    """Print what became of it and write the files, or say what is wrong; returns the exit code."""
    conversations = kept[:config.num_conversations]
    print_tally(tally, len(kept), tokens=paid)
    if conversations:
        print_diversity(conversations, persona)
    if tally.code:
        print(f"error: {tally.problem}", file=sys.stderr)
        if paid and kept:
            print(f"kept {len(kept)} in {paid.path}, paid for once: go on with "
                  f"{command_again(config)}\nor make do with them: "
                  f"{command_again(replace(config, num_conversations=len(kept)))}", file=sys.stderr)
        elif paid:
            print("nothing was kept; the offline teacher needs no server: python "
                  "edu/06_identity.py", file=sys.stderr)
        return tally.code
    path, test = (config.data_dir / f"my_identity{end}.jsonl" for end in ("", "_test"))
    save_rows(path, conversations)
    save_rows(test, held_out_rows(persona))
    print(f"wrote {path} ({len(conversations)} conversations)")
    print(f"wrote {test} ({len(HELD_OUT_PROMPTS)} held-out prompts)")
    print(f"result: valid conversations {tally.earlier} -> {len(kept)} (n={len(conversations)})")
    print("next: python edu/07_sft_data.py")
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_script(run, Config, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())

"""Openings from which a teacher writes its own text, when no data set is at hand.

Does: hold two lists of varied prompts on disjoint topics, one to train on and one to measure on. Does not: sample from
a model (mar.generate), or store what it wrote (mar.data).
"""

TRAIN_PROMPTS: tuple[str, ...] = (
    # requests
    "Explain to a beginner how compound interest works, with one worked example.",
    "Give me a recipe for a simple vegetable soup and tell me what each step is for.",
    "List the main causes of soil erosion and say what a farmer can do about each of them.",
    "Write a polite letter to a landlord asking for a broken heater to be repaired.",
    "Compare travelling by train with travelling by car for a family of four.",
    "How should I prepare for a job interview at a small company?",
    "Summarise the advantages and disadvantages of working from home.",
    "A shop sells pens at 3 for 2 dollars. How much do 18 pens cost? Show your work step by step.",
    # stories
    "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "Once upon a time there was a young fox who was afraid of the dark.",
    "Tell a story in which two sisters build a boat out of things they find in the attic.",
    "The old clock in the hall struck thirteen, and everyone at the table stopped talking.",
    "Write a story for children about a cloud that did not want to rain.",
    "When Daniel opened the door of the abandoned station, he heard a piano playing somewhere below.",
    # technical texts
    "Describe how a hash table stores and finds its entries, and what happens when two keys collide.",
    "Write a Python function that counts how often each word occurs in a text, and explain it.",
    "What is the difference between a process and a thread in an operating system?",
    "Chapter 3: Measuring electric current. An ammeter is always connected in",
    "Explain how a bicycle gear changes the force that is needed to climb a hill.",
    "Write an SQL query which lists all customers without an order, and say how it works.",
    # dialogues
    "Write a conversation between a customer and a waiter about a dish that came out cold.",
    "A: Have you ever been to the mountains in winter?\nB:",
    "Write a dialogue between a doctor and a patient who cannot sleep.",
    "Interviewer: You have kept bees for thirty years. How did it begin?\nBeekeeper:",
    "Write a chat in which one friend helps the other to choose a birthday present.",
    # encyclopedic texts
    "The printing press is a machine that",
    "Write an encyclopedia article about the life cycle of the salmon.",
    "Volcanoes form where",
    "What were the most important events of the Industrial Revolution in Britain?",
    "The city of Lisbon, the capital of Portugal, lies",
    "Explain what the heart does and how blood moves through the human body.",
    "Johann Sebastian Bach was a German composer who",
)
"""32 prompts for training text."""

HELD_OUT_PROMPTS: tuple[str, ...] = (
    # requests
    "Explain to a teenager why sleep matters, and give five habits that help.",
    "Write a short speech for the opening of a public library.",
    "What should I check before I buy a second-hand guitar?",
    "A tank holds 240 litres and loses 8 litres an hour. After how many hours is it a quarter full? Explain.",
    # stories
    "Write a short story about a baker who receives the same strange order every Monday.",
    "The last bus had left, and the girl with the red umbrella was still waiting.",
    "Tell a story about a robot that learns to paint.",
    # technical texts
    "Describe how a refrigerator moves heat from the inside to the outside.",
    "Write a Python function that checks whether a word is a palindrome, with a few tests.",
    "Explain what version control is and why teams of programmers use it.",
    # dialogues
    "Write a conversation between a tourist who has lost a passport and a police officer.",
    "A: Which film made you laugh the most?\nB:",
    "Write a dialogue between a grandfather and his grandson while they repair a kite.",
    # encyclopedic texts
    "Write an encyclopedia article about the camel and how it lives in the desert.",
    "Photosynthesis is the process by which",
    "Why did the Roman Empire build so many roads, and how were they made?",
)
"""16 prompts on other topics, for text that no training run has seen."""

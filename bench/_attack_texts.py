"""Hand-written material of ``router_attacks.py``: hijacks, fillers, foreign questions."""

from __future__ import annotations

from typing import Final

HIJACKS: Final = {
    "sql": (
        "SELECT * FROM orders WHERE id = 1;",
        "In SQL, tables customers(id, name):",
        "database schema query join group by",
    ),
    "math": (
        "Tom has 3 apples and buys 5 more, how many?",
        "Solve this word problem step by step:",
        "arithmetic: 12 + 7 - 4 =",
    ),
    "json": (
        "Return JSON with keys name, age, city:",
        '{"name": "", "age": 0} extract as JSON:',
        "structured output, fields, schema:",
    ),
    "convert": (
        "Convert 5 km to m.",
        "In ISO format, YYYY-MM-DD:",
        "hours to minutes, kilograms to grams:",
    ),
}

FILLERS: Final = (
    "Thank you so much for your help, I really appreciate it, you are the best. " * 8,
    "blah " * 120,
    "As I said before, this is important to me and I will be glad to hear from you soon. " * 6,
    "------------------------------ " * 20,
)

# (prompt, category): German, French, Spanish, Italian, Portuguese, Dutch
FOREIGN: Final = (
    ("Anna hat 12 Äpfel und gibt 5 davon ihrem Bruder. Wie viele bleiben ihr?", "math"),
    ("Un train part avec 40 personnes, 12 descendent et 7 montent. Combien sont à bord ?", "math"),
    ("Tengo 30 euros y compro tres libros de 8 euros. ¿Cuánto dinero me queda?", "math"),
    ("Luca compra 4 quaderni da 3 euro e una penna da 2 euro. Quanto spende?", "math"),
    ("O João tinha 18 bolas e perdeu 6. Depois ganhou 4. Quantas tem agora?", "math"),
    ("Er zitten 24 kinderen in de klas, de helft gaat naar buiten. Hoeveel blijven er?", "math"),
    ("Schreibe eine SQL-Abfrage: Tabelle kunden(id, name, stadt). Alle Namen aus Berlin.", "sql"),
    ("Requête SQL pour compter les commandes de 2021, table commandes(id, client, annee).", "sql"),
    ("Consulta SQL: tabla libros(id, titulo, precio). Los títulos que cuestan más de 20.", "sql"),
    ("Scrivi in SQL la somma degli importi nella tabella ordini(id, importo, anno).", "sql"),
    (
        "Consulta SQL para a média de preço por categoria, tabela produtos(id, categoria, preco).",
        "sql",
    ),
    ("SQL-query voor alle auto's met meer dan 100000 km, tabel autos(kenteken, km).", "sql"),
    ("Gib mir ein JSON mit name, alter und stadt: Ich bin Jonas, 41, aus Köln.", "json"),
    ("Extrais en JSON les champs produit et prix : une lampe verte à 35 euros.", "json"),
    ("Devuelve un JSON con las claves equipo y puntos: El Real ganó con 85 puntos.", "json"),
    ("Estrai in JSON mittente e oggetto: mail di Paola sulla riunione di lunedì.", "json"),
    ("Responda em JSON com cidade e temperatura: hoje faz 28 graus no Porto.", "json"),
    ("Zet om naar JSON met de velden merk en jaar: Ik rijd een Volvo uit 2016.", "json"),
    ("Warum ist der Himmel blau?", "general"),
    ("Quelle est la capitale de la France ?", "general"),
    ("Cuéntame una historia corta sobre un perro.", "general"),
    ("Chi ha dipinto la Gioconda?", "general"),
    ("Que língua se fala no Brasil?", "general"),
    ("Wat is een leuke naam voor een kat?", "general"),
)

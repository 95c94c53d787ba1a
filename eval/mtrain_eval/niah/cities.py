"""Cities that magic numbers belong to; each once, none of them an ordinary English word."""

CITIES = tuple(
    "Amsterdam|Ankara|Antwerp|Athens|Auckland|Baku|Bangkok|Barcelona|Beirut|Belgrade|Bergen|Berlin|Bern|Bogota|Bologna|"
    "Bratislava|Brisbane|Brussels|Bucharest|Budapest|Cairo|Calgary|Caracas|Casablanca|Chicago|Cologne|Copenhagen|Dakar|"
    "Damascus|Denver|Dhaka|Dresden|Dublin|Edinburgh|Florence|Geneva|Genoa|Glasgow|Gothenburg|Hamburg|Hanoi|Havana|Helsinki|"
    "Istanbul|Jakarta|Kampala|Kathmandu|Kigali|Kingston|Krakow|Kyoto|Lagos|Leipzig|Lima|Lisbon|Ljubljana|Lyon|Madrid|Malaga|"
    "Manila|Marseille|Melbourne|Miami|Milan|Montevideo|Montreal|Mumbai|Munich|Nairobi|Naples|Nicosia|Osaka|Oslo|Ottawa|"
    "Palermo|Perth|Porto|Prague|Quito|Reykjavik|Riga|Rotterdam|Salzburg|Santiago|Sarajevo|Seattle|Seoul|Seville|Sofia|"
    "Stockholm|Stuttgart|Sydney|Tallinn|Tbilisi|Tirana|Tokyo|Toronto|Toulouse|Trieste|Tunis|Turin|Utrecht|Valencia|Vancouver|"
    "Verona|Vienna|Vilnius|Warsaw|Wellington|Zagreb|Zurich".split("|")
)

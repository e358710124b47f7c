"use strict";
{
  const PAGE = 200; // list entries added at a time, so that 20,000 conversations stay quick
  const element = (id) => document.getElementById(id);
  const conversations = JSON.parse(element("conversations").textContent);
  const kinds = JSON.parse(element("kinds").textContent);
  const [search, matches, list, more, pane] =
    ["search", "matches", "list", "more", "conversation"].map(element);
  let found = conversations;
  let current = null;

  // Text of the corpus only ever goes through textContent: none of it can become markup.
  const make = (tag, className, text) => {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };

  const textOf = (segments) => segments.filter((_, i) => i % 2).join("");
  const beginning = (one) => {
    const asked = one.blocks.find(([role]) => role === "human") || one.blocks[0] || ["", []];
    const said = asked[1].filter((_, i) => i % 2 && kinds[asked[1][i - 1]] !== "frame").join("");
    return said.slice(0, 200).replace(/\s+/g, " ").trim() || "(empty)";
  };
  const about = (one) => {
    const facts = [one.language];
    if (one.tokens !== null) {
      facts.push(`${one.tokens.toLocaleString("en")} tokens`);
      facts.push(`${one.learned.toLocaleString("en")} learned`);
    }
    return facts;
  };

  // Made once, on the first search: what is searched, in lower case.
  let haystacks = null;
  const searchable = (one) =>
    [one.id, one.language, ...one.notes, ...one.blocks.map(([, segments]) => textOf(segments))]
      .join("\n").toLowerCase();

  const filter = () => {
    const wanted = search.value.trim().toLowerCase();
    if (wanted) haystacks ??= conversations.map(searchable);
    found = wanted ? conversations.filter((_, i) => haystacks[i].includes(wanted)) : conversations;
    list.replaceChildren();
    extend();
    const count = found.length.toLocaleString("en");
    matches.textContent = wanted ? `${count} of ${conversations.length.toLocaleString("en")}` : "";
    mark(wanted);
  };

  const extend = () => {
    const from = list.childElementCount;
    for (const one of found.slice(from, from + PAGE)) {
      const button = make("button");
      button.type = "button";
      button.append(
        make("span", "begins", beginning(one)),
        make("span", "about", [`${one.index} · ${one.id}`, ...about(one)].join(" · ")),
      );
      button.addEventListener("click", () => {
        show(one, button);
        // On a narrow screen the conversation stands below the list.
        const below = pane.getBoundingClientRect().top;
        if (below > window.innerHeight * 0.7) pane.scrollIntoView({ block: "start" });
      });
      if (one === current) button.setAttribute("aria-current", "true");
      const item = make("li");
      item.append(button);
      list.append(item);
    }
    more.hidden = list.childElementCount >= found.length;
  };

  const show = (one, button) => {
    list.querySelector("[aria-current]")?.removeAttribute("aria-current");
    button?.setAttribute("aria-current", "true");
    current = one;
    const turns = one.blocks.map(([role, segments]) => {
      const turn = make("div", "turn");
      const text = make("p", "text");
      for (let i = 0; i < segments.length; i += 2) {
        text.append(make("span", kinds[segments[i]], segments[i + 1]));
      }
      turn.append(make("p", "role", role || "as the template renders it"), text);
      return turn;
    });
    const notes = [`conversation ${one.index}`, ...about(one), ...one.notes].join(" · ");
    pane.replaceChildren(make("h3", "", one.id), make("p", "note", notes), ...turns);
    pane.scrollTop = 0;
    mark(search.value.trim().toLowerCase());
  };

  // Highlights what was searched for without touching the elements; older browsers go without.
  const mark = (wanted) => {
    if (!CSS.highlights) return;
    const ranges = [];
    const walker = document.createTreeWalker(pane, NodeFilter.SHOW_TEXT);
    while (wanted && walker.nextNode()) {
      const text = walker.currentNode.data.toLowerCase();
      if (text.length !== walker.currentNode.length) continue; // a letter grew in lower case
      for (let at = text.indexOf(wanted); at >= 0; at = text.indexOf(wanted, at + wanted.length)) {
        const range = new Range();
        range.setStart(walker.currentNode, at);
        range.setEnd(walker.currentNode, at + wanted.length);
        ranges.push(range);
      }
    }
    CSS.highlights.set("found", new Highlight(...ranges));
  };

  let waiting = 0;
  search.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(filter, 120);
  });
  more.addEventListener("click", extend);
  list.addEventListener("keydown", (event) => {
    const step = { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" }[event.key];
    const next = step && event.target.closest("li")?.[step]?.firstElementChild;
    if (!next) return;
    event.preventDefault();
    next.focus();
    next.click();
  });
  filter();
  if (found.length) show(found[0], list.querySelector("button"));
}

// The prompt of the run, written as in training: see "turns" of model_info.json.

/** Names of special tokens inside a text are made harmless by a space, so that a text cannot close its own turn. */
export function escape(text, info) {
  for (const token of info.special_tokens) text = text.replaceAll(token, `${token[0]} ${token.slice(1)}`);
  return text;
}

/** The messages of one text: the system turn and the question of the run around it. */
export function messagesFor(text, info) {
  return [{ role: 'system', content: info.system }, { role: 'user', content: info.user.replace('{text}', () => text) }];
}

/** The prompt for {role, content} messages. `addsBegin`: the runtime writes the first token of a prompt itself. */
export function render(messages, info, addsBegin) {
  const { begin, opening, closing, answer } = info.turns;
  const turns = messages.map(({ role, content }) => opening[role] + escape(content, info) + closing[role]);
  return (addsBegin ? '' : begin) + turns.join('') + answer;
}

// Put behind dashboard.js in the page that `ebt dashboard` serves: its server answers what a kernel answers in Lab.

// The same interface as the model of a widget; every request is a POST with the token in a header.
function servedModel(values, token) {
  const listeners = [];
  const answer = (response) => {
    values.response = response;
    for (const listener of listeners) listener();
  };
  return {
    get: (name) => values[name],
    set: (name, value) => { values[name] = value; },
    on: (event, listener) => { if (event === "change:response") listeners.push(listener); },
    off: () => {},
    save_changes: async () => {
      const { id, ...request } = values.request;
      try {
        const reply = await fetch("request", {
          method: "POST", body: JSON.stringify(request), cache: "no-store",
          headers: { "Content-Type": "application/json", "X-Dashboard-Token": token },
        });
        answer({ id, ...await reply.json() });
      } catch {
        answer({ id, error: "The server does not answer. Start `ebt dashboard` again and open what it prints." });
      }
    },
  };
}

const served = JSON.parse(document.getElementById("served").textContent);
history.replaceState(null, "", location.pathname); // the token is in no history, and in no copied address
render({ model: servedModel(served.values, served.token), el: document.getElementById("dashboard") });

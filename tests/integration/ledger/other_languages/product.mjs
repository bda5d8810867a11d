// A product in Node. It acts through ledger.mjs, which is the example of kino_refunds/ledger/README.md.
// Run by: node product.mjs ACT JSON; prints what the act returned as JSON, each BigInt as {"bigint": "…"}.
import { ledger, pool, read, submit, transaction } from "./ledger.mjs";

const GRANT = "SELECT * FROM kino.grant_lots($1)";
const OPEN = "SELECT * FROM kino.open_charges($1)";

const deadline = new Date(Date.now() + 600_000).toISOString();
const item = (job_id, account_id, credits) => ({ job_id, account_id, credits, deadline_at: deadline });

/** Insert a row of the product's own, call the ledger, and commit the row together with what the ledger said. */
function beside(table, id, statement, items) {
  return transaction(async (client) => {
    await client.query(`INSERT INTO shop.${table} VALUES ($1, 'new')`, [id]);
    const { rows, refused, message } = await ledger(client, statement, items);
    await client.query(`UPDATE shop.${table} SET state = $2 WHERE ${table}_id = $1`, [id, refused ?? "accepted"]);
    return { rows, refused, message };
  });
}

/** Return once the session with this process id waits for a lock. */
async function waits(processID) {
  for (let tries = 0; tries < 2_000; tries += 1) {
    const { rows } = await pool.query("SELECT cardinality(pg_blocking_pids($1)) > 0 AS waits", [processID]);
    if (rows[0].waits) return;
    await new Promise((resolve) => setTimeout(resolve, 2));
  }
  throw new Error("the session does not wait for a lock");
}

/** Open one job on two connections; the second waits until the first ends by `end`. */
async function twice({ end }) {
  const [first, second] = [await pool.connect(), await pool.connect()];
  await first.query("BEGIN");
  await second.query("BEGIN");
  const one = await ledger(first, OPEN, [item("job-42", "acme", 8)]);
  const waiting = ledger(second, OPEN, [item("job-42", "acme", 8)]);
  await waits(second.processID);
  await first.query(end);
  const two = await waiting;
  await second.query("COMMIT");
  first.release();
  second.release();
  return { same: one.rows[0].o_charge_id === two.rows[0].o_charge_id, refused: two.refused };
}

/** Two transactions open two charges each, in opposite orders of the accounts: Postgres ends one by a deadlock. */
async function crossed() {
  let tries = 0;
  const arrived = [];
  const opens = (own, other) =>
    transaction(async (client) => {
      tries += 1;
      const one = await ledger(client, OPEN, [item(`${own}-1`, own, 1)]);
      // On their first tries both hold their own account's lots before either asks for the other's.
      if (arrived.length < 2) await new Promise((go) => arrived.push(go) === 2 && arrived.forEach((each) => each()));
      const two = await ledger(client, OPEN, [item(`${own}-2`, other, 1)]);
      return [one.rows.length, two.rows.length];
    });
  return { opened: await Promise.all([opens("acme", "beta"), opens("beta", "acme")]), tries };
}

/** At REPEATABLE READ, another transaction draws from the lot after this one's snapshot. */
async function overtaken() {
  let tries = 0;
  const opened = await transaction(async (client) => {
    await client.query("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ");
    await client.query("SELECT 1");
    tries += 1;
    if (tries === 1) await submit({ id: "other", account: "acme", credits: 1, deadline });
    const { rows } = await ledger(client, OPEN, [item("job-42", "acme", 8)]);
    return rows.length;
  });
  return { opened, tries };
}

/** The server ends the session in the middle of a transaction; the pool goes on with another connection. */
async function cut() {
  const failed = await transaction(async (client) => {
    await client.query("INSERT INTO shop.job VALUES ('lost', 'new')");
    await client.query("SELECT pg_terminate_backend(pg_backend_pid())");
  }).catch((error) => error.code);
  return { failed, then: await submit({ id: "job-42", account: "acme", credits: 8, deadline }) };
}

const acts = {
  buy: ({ id, items }) => beside("purchase", id, GRANT, items),
  charge: ({ id, items }) => beside("job", id, OPEN, items),
  submit: (job) => submit({ deadline, ...job }),
  submitAll: (jobs) => Promise.all(jobs.map((job) => submit({ deadline, ...job }))),
  read: ({ job, account }) => read(pool, job, account),
  // What the page warns of: an array that is not made into a string first.
  array: () => pool.query(OPEN, [[item("job-42", "acme", 8)]]).catch((error) => error.code),
  twice,
  crossed,
  overtaken,
  cut,
};

const [act, input = "{}"] = process.argv.slice(2);
try {
  const result = await acts[act](JSON.parse(input));
  console.log(JSON.stringify(result, (_, value) => (typeof value === "bigint" ? { bigint: `${value}` } : value)));
} catch (error) {
  console.log(JSON.stringify({ threw: error.message }));
} finally {
  await pool.end();
}

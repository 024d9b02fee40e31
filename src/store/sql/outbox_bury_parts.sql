-- Ends a batch that was divided: what was refused is set aside, the rest is appended. Primary keys.
-- $1 id  $2 places of those set aside, from 1  $3 the error of each
with gone as (
    delete from shardmq.outbox_batch b where b.id = $1
    returning b.topic, b.ids, b.uids, b.keys, b.headers, b.payloads
)
insert into shardmq.outbox_dead (id, uid, topic, key, headers, payload, error, died_at)
select g.ids[e.place], g.uids[e.place], g.topic, g.keys[e.place], g.headers[e.place], g.payloads[e.place],
       e.error, shardmq.clock()
  from gone g, unnest($2::int[], $3::text[]) e (place, error)
on conflict (id) do nothing

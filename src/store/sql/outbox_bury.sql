-- Sets messages aside that no partition takes. Under the relay's lock only. Primary keys.
-- $1 ids of the outbox  $2 ids of those for later  $3 all these ids  $4 the error of each
with gone as (
    delete from shardmq.outbox o using unnest($1::bigint[]) w (id)
     where o.id = w.id and current_setting('shardmq.relay', true) = 'true'
    returning o.id, o.topic, o.key, o.headers, o.payload
), due as (
    delete from shardmq.delayed d using unnest($2::bigint[]) w (id)
     where d.id = w.id and current_setting('shardmq.relay', true) = 'true'
    returning d.id, d.topic, d.key, d.headers, d.payload
)
insert into shardmq.outbox_dead as x (id, topic, key, headers, payload, error, died_at)
select m.id, m.topic, m.key, m.headers, m.payload,
       ($4::text[])[array_position($3::bigint[], m.id)], shardmq.clock()
  from (select * from gone union all select * from due) m
on conflict (id) do nothing
returning x.id, x.topic, x.error
